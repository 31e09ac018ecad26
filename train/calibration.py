"""Calibration of probabilities by a temperature that is fitted to the validation records.

Shapes: N records, K classes or labels.
"""

import math

import numpy as np

from train.tasks import Arrays, NamedTarget, Task

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.2, 5.0
# Quantile of the chi-squared distribution with one degree of freedom at 0.95.
SIGNIFICANT = 3.841459


def fit_temperature(task: Task, outputs: Arrays, targets: np.ndarray) -> float:
    """Return the temperature, a divisor of logits, that minimises the log loss of these records.

    outputs: {"logits": float32 [N, K]} of records that the network was not trained on. targets: as
    the task encodes them, int64 [N] for classes and uint8 [N, K] for labels. The result is 1 for a
    numeric target, and 1 unless another temperature lowers the loss significantly (likelihood-ratio
    test at 5 %). After Guo et al., On calibration of modern neural networks,
    https://arxiv.org/abs/1706.04599.
    """
    if not isinstance(task.target, NamedTarget):
        return 1.0
    from scipy.optimize import minimize_scalar  # the import takes half a second

    def loss(log_temperature: float) -> float:
        target = task.calibrated(math.exp(log_temperature)).target
        return target.metrics(outputs, targets)["loss"]

    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    if 2 * len(targets) * (loss(0.0) - float(found.fun)) <= SIGNIFICANT:
        return 1.0
    return round(math.exp(float(found.x)), 6)
