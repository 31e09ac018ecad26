"""Metrics of predictions, each with the direction in which it gets better.

Shapes: N records, K classes. A metric of no records, or of a single class where it takes two, has
the value of a guess.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# Bins of confidence for the calibration error.
NUM_BINS = 15
# As a metric to choose an epoch by: none is chosen, the last one counts.
LAST = "last"


@dataclass(frozen=True)
class Metric:
    """The name of a metric, as `metrics` of a target returns it, and which values are better.

    In rows of epochs and in manifests the name has the split before it, as in "valid_loss".
    """

    name: str
    better: Literal["higher", "lower"]

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(
                f"metric '{self.name}' is better '{self.better}'; expected 'higher' or 'lower'"
            )

    def of_split(self, split: str) -> "Metric":
        return replace(self, name=f"{split}_{self.name}")

    def signed(self, values: Mapping[str, float]) -> float:
        """The metric's value with the sign that makes more of it better; -inf for NaN."""
        value = values[self.name]
        if math.isnan(value):
            return -math.inf
        return value if self.better == "higher" else -value


LAST_EPOCH = Metric("epoch", "higher")


def best_epoch(rows: Sequence[Mapping[str, float]], metric: Metric) -> Mapping[str, float]:
    """The epoch whose weights a run keeps: the best, and of equal ones the later."""
    return max(rows, key=lambda row: (metric.signed(row), row["epoch"]))


def log_loss(probabilities_N: np.ndarray) -> float:
    """Mean negative logarithm of the probabilities that the true classes were given."""
    return float(-np.mean(np.log(np.maximum(probabilities_N, 1e-12))))


def balanced_accuracy(targets_N: np.ndarray, chosen_N: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their records that were recognised."""
    found = [np.mean(chosen_N[targets_N == each] == each) for each in np.unique(targets_N)]
    return float(np.mean(found)) if found else 0.0


def f1_score(true_N: np.ndarray, chosen_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall of one class; 0 where it is never recognised.

    true_N, chosen_N: bool, whether a record is of the class, and whether it was said to be.
    """
    return float(2 * np.sum(true_N & chosen_N) / max(int(true_N.sum() + chosen_N.sum()), 1))


def roc_auc(true_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the ROC curve: how often a record of the class scores higher than another.

    0.5 where all records are of the class, or none; NaN if a score is.
    """
    if np.isnan(scores_N).any():
        return math.nan
    if true_N.all() or not true_N.any():
        return 0.5
    import sklearn.metrics  # takes a second, and serving needs none of it

    return float(sklearn.metrics.roc_auc_score(true_N, scores_N))


def average_precision(true_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Precision at each record of the class, by falling score, averaged over these records.

    A guess gets the class's share; it is 0 where no record is of the class, NaN if a score is.
    """
    if np.isnan(scores_N).any():
        return math.nan
    if not true_N.any():
        return 0.0
    import sklearn.metrics

    return float(sklearn.metrics.average_precision_score(true_N, scores_N))


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Expected calibration error: how far confidence is from the share of right answers.

    The mean over bins of confidence of equal width, weighted by their records. After Guo et al.,
    On calibration of modern neural networks, https://arxiv.org/abs/1706.04599.
    """
    if np.isnan(confidence_N).any():
        return math.nan
    bins_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins_N, confidence_N.astype(np.float64) - right_N, NUM_BINS)
    return float(np.abs(gaps).sum() / max(len(confidence_N), 1))


def quantile_loss(errors_N: np.ndarray, quantile: float) -> float:
    """Mean loss of predicting a quantile; errors_N: truths less predictions."""
    return float(np.mean(pinball(errors_N, quantile)))


def pinball(errors_N: np.ndarray, quantile: float) -> np.ndarray:
    """The loss of predicting a quantile, [N]; errors_N: truths less predictions."""
    return np.maximum(quantile * errors_N, (quantile - 1) * errors_N)
