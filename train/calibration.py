"""Calibration of probabilities: one temperature, which the validation records choose."""

import math

import numpy as np

from train.tasks import Arrays, NamedTarget, Task

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.2, 5.0
# Quantile of the chi-squared distribution with one degree of freedom at 0.95.
SIGNIFICANT = 3.841459


def fit_temperature(task: Task, outputs: Arrays, targets: np.ndarray) -> float:
    """Return what outputs are to be divided by so that the log loss of these records is least.

    outputs: {"logits": [N, K]} of records that the net was not trained on. It is 1 unless that
    lowers the loss by more than chance, by a likelihood-ratio test. After Guo et al., On
    calibration of modern neural networks, https://arxiv.org/abs/1706.04599.
    """
    if not isinstance(task.target, NamedTarget):
        return 1.0
    from scipy.optimize import minimize_scalar  # takes half a second, and serving needs none of it

    def loss(log_temperature: float) -> float:
        target = task.calibrated(math.exp(log_temperature)).target
        return target.metrics(outputs, targets)["loss"]

    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    if 2 * len(targets) * (loss(0.0) - float(found.fun)) <= SIGNIFICANT:
        return 1.0
    return round(math.exp(float(found.x)), 6)
