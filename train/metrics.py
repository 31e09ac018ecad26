"""Metrics of predictions, each with the direction in which it improves.

Shapes: N records. A metric of no records, or of a single class where it needs two, has the value of
a random guess.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# Number of confidence bins for the calibration error.
NUM_BINS = 15
# Value of checkpoint.metric that keeps the last epoch instead of the best one.
LAST = "last"


@dataclass(frozen=True)
class Metric:
    """The name of a metric, as a target's `metrics` returns it, and whether higher is better.

    In the rows of epochs and in manifests the name starts with the split, as in "valid_loss".
    Raises ValueError if `better` is neither "higher" nor "lower".
    """

    name: str
    better: Literal["higher", "lower"]

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(
                f"metric '{self.name}' has better='{self.better}'; expected 'higher' or 'lower'"
            )

    def of_split(self, split: str) -> "Metric":
        """Return the metric of a split, such as "valid_loss" for "loss"."""
        return replace(self, name=f"{split}_{self.name}")

    def signed(self, values: Mapping[str, float]) -> float:
        """Return the metric's value, negated if lower values are better; -inf for NaN."""
        value = values[self.name]
        if math.isnan(value):
            return -math.inf
        return value if self.better == "higher" else -value


LAST_EPOCH = Metric("epoch", "higher")


def best_epoch(rows: Sequence[Mapping[str, float]], metric: Metric) -> Mapping[str, float]:
    """Return the row of the epoch whose weights a run keeps: the best, or the last of equals."""
    return max(rows, key=lambda row: (metric.signed(row), row["epoch"]))


def log_loss(probabilities_N: np.ndarray) -> float:
    """Return the mean negative logarithm of the true classes' probabilities, float [N]."""
    return float(-np.mean(np.log(np.maximum(probabilities_N, 1e-12))))


def balanced_accuracy(targets_N: np.ndarray, chosen_N: np.ndarray) -> float:
    """Return the mean recall of the classes that occur.

    targets_N, chosen_N: int [N], true and predicted classes.
    """
    found = [np.mean(chosen_N[targets_N == each] == each) for each in np.unique(targets_N)]
    return float(np.mean(found)) if found else 0.0


def f1_score(true_N: np.ndarray, chosen_N: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of one class; 0 if it is never recognised.

    true_N, chosen_N: bool [N], whether a record is of the class, and whether it is predicted to be.
    """
    return float(2 * np.sum(true_N & chosen_N) / max(int(true_N.sum() + chosen_N.sum()), 1))


def roc_auc(true_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Return the area under the ROC curve: how often a record of the class scores above another.

    true_N: bool [N], whether a record is of the class. scores_N: float [N]. The result is 0.5 if
    all records or no records are of the class, and NaN if a score is NaN.
    """
    if np.isnan(scores_N).any():
        return math.nan
    if true_N.all() or not true_N.any():
        return 0.5
    import sklearn.metrics  # the import takes a second

    return float(sklearn.metrics.roc_auc_score(true_N, scores_N))


def average_precision(true_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Return the mean, over the records of the class, of the precision at each record's score.

    true_N: bool [N], whether a record is of the class. scores_N: float [N]. A random guess has the
    class's share of the records. The result is 0 if no record is of the class, and NaN if a score
    is NaN.
    """
    if np.isnan(scores_N).any():
        return math.nan
    if not true_N.any():
        return 0.0
    import sklearn.metrics

    return float(sklearn.metrics.average_precision_score(true_N, scores_N))


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy.

    confidence_N: float [N], 0..1. right_N: bool [N], whether the prediction is right. The gap is
    averaged over confidence bins of equal width, weighted by their numbers of records. The result
    is NaN if a confidence is NaN. After Guo et al., On calibration of modern neural networks,
    https://arxiv.org/abs/1706.04599.
    """
    if np.isnan(confidence_N).any():
        return math.nan
    bins_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins_N, confidence_N.astype(np.float64) - right_N, NUM_BINS)
    return float(np.abs(gaps).sum() / max(len(confidence_N), 1))


def quantile_loss(errors_N: np.ndarray, quantile: float) -> float:
    """Return the mean pinball loss; errors_N: float [N], targets minus predictions."""
    return float(np.mean(pinball(errors_N, quantile)))


def pinball(errors_N: np.ndarray, quantile: float) -> np.ndarray:
    """Return each record's loss of predicting a quantile, float [N].

    errors_N: float [N], targets minus predictions. quantile: its level, such as 0.9.
    """
    return np.maximum(quantile * errors_N, (quantile - 1) * errors_N)
