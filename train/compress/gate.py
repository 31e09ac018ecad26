"""The gate: compares a variant with fp32 on held-out records; only accepted variants are served.

Shapes: N records, K outputs of the model or classes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.bundle.engines import Engine
from train.stats import bootstrap_interval, paired_interval
from train.tasks import Arrays, ClassTarget, Task
from train.tasks.regression import ValueTarget
from train.values.ragged import StoredArrays
from train.values.records import num_rows

# Tolerance for rounding errors in a drop that equals the limit exactly, such as 5 of 1000 records.
EPSILON = 1e-9
# Prefix of the names of validation metrics.
VALID = "valid_"
# Metrics in the unit of the target; drops are divided by its standard deviation.
IN_UNITS = ("rmse", "mae", "quantile_loss")
BATCH_SIZES = (1, 7, 64)
# Largest accepted difference between predictions for the same record in different batches.
MAX_BATCH_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class VariantComparison:
    """A variant compared with fp32 on the same records.

    reference, value: the metric of fp32 and of the variant.
    drop: how much worse the variant's metric is, positive if it is worse; errors in the target's
    unit are divided by its standard deviation. low, high: 95 % confidence interval of the drop.
    agreement: share of records with the same label; for numbers, the R² of the variant's
    predictions as a prediction of those of fp32.
    change: mean difference of the predictions: for probabilities, half the sum of absolute
    differences over the classes; for numbers, in standard deviations of the target.
    """

    metric: str
    reference: float
    value: float
    drop: float
    low: float
    high: float
    agreement: float
    change: float


@dataclass(frozen=True)
class GateVerdict:
    """The decision on a variant, with the reason in words."""

    verdict: Literal["accepted", "refused", "undecided"]
    reason: str


def compare_with_fp32(
    task: Task,
    reference: Arrays,
    outputs: Arrays,
    targets_N: np.ndarray,
    name: str | None = None,
    *,
    interval: bool = True,
) -> VariantComparison:
    """Compare the outputs of a variant with those of fp32 for the same records.

    reference, outputs: {"logits": float32 [N, K]} of fp32 and of the variant. targets_N: encoded
    targets, [N] or, for multilabel tasks, [N, K].
    name: metric to compare, such as "valid_loss"; default: the task's main metric.
    interval: whether to compute the confidence interval, which needs 1000 bootstrap draws for most
    metrics; its ends are NaN otherwise.
    """
    target, found = task.target, task.find_metric(name)
    metric = found.name.removeprefix(VALID)

    def value_of(each: Arrays, targets_N: np.ndarray) -> float:
        return task.metric_value(metric, each, targets_N)

    before, after = value_of(reference, targets_N), value_of(outputs, targets_N)
    sign = 1.0 if found.better == "lower" else -1.0
    if metric in IN_UNITS:
        sign /= _scale(task)
    if not interval:
        low = high = math.nan
    elif isinstance(target, ClassTarget) and metric == "accuracy":
        low, high = paired_interval(
            *(
                target.choose(target.probabilities(each)) != targets_N
                for each in (reference, outputs)
            ),
            binary=True,
        )
    else:

        def drop(rows: np.ndarray) -> float:
            before, after = (
                value_of({"logits": each["logits"][rows]}, targets_N[rows])
                for each in (reference, outputs)
            )
            # A draw in which only the variant's metric is NaN counts as infinitely worse.
            return (
                math.inf
                if math.isnan(after) and not math.isnan(before)
                else sign * (after - before)
            )

        low, high = bootstrap_interval(drop, len(targets_N))
    return VariantComparison(
        metric=metric,
        reference=before,
        value=after,
        drop=sign * (after - before) + 0.0,  # no negative zero
        low=low,
        high=high,
        agreement=_agreement(task, reference, outputs),
        change=_change(task, reference, outputs),
    )


def judge_variant(
    comparison: VariantComparison,
    max_drop: float,
    *,
    max_change: float = math.inf,
    strict: bool = False,
    batch: float = 0.0,
) -> GateVerdict:
    """Return whether a variant is accepted: its drop must be at most `max_drop`.

    A variant with a larger drop is refused if the whole confidence interval is above `max_drop`.
    Otherwise it is undecided; more held-out records would decide.
    max_change: largest accepted `comparison.change`, for variants that represent the same network
    as fp32. It detects wrong weights that keep the labels but distort the probabilities.
    strict: accept only if the upper end of the interval is at most `max_drop`; a variant whose
    drop alone is within the limit is undecided.
    batch: largest difference between predictions for the same record in different batches, as
    `batch_difference` returns it.
    """
    c = comparison
    figures = (
        f"{c.metric} {c.value:.4f}, fp32 {c.reference:.4f}, "
        f"drop {c.drop:+.4f} [{c.low:+.4f}, {c.high:+.4f}], agreement {c.agreement:.4f}"
    )
    if not batch <= MAX_BATCH_DIFFERENCE:
        return GateVerdict(
            "refused",
            f"predictions for the same record differ between batches by {batch:.2g} "
            f"(limit {MAX_BATCH_DIFFERENCE:g}); {figures}",
        )
    # `not <=` also refuses NaN.
    if not c.change <= max_change:
        return GateVerdict(
            "refused",
            f"predictions differ from fp32 by {c.change:.4f} on average (limit {max_change:g} "
            f"for variants of the same network); {figures}",
        )
    if c.drop <= max_drop + EPSILON:
        if not strict or c.high <= max_drop + EPSILON:
            unsure = ", which the interval exceeds; more validation records would narrow it"
            beyond = unsure if c.high > max_drop + EPSILON else ""
            return GateVerdict("accepted", f"{figures}: within the limit {max_drop:g}{beyond}")
        return GateVerdict("undecided", f"{figures}: the interval exceeds the limit {max_drop:g}")
    if not math.isnan(c.drop) and c.low <= max_drop + EPSILON:
        return GateVerdict(
            "undecided", f"{figures}: above the limit {max_drop:g}, but the interval includes it"
        )
    return GateVerdict("refused", f"{figures}: above the limit {max_drop:g}")


def batch_difference(task: Task, engine: Engine, inputs: StoredArrays) -> float:
    """Return how much predictions for the same records differ between batches of 1, 7 and 64.

    inputs: encoded arrays [N, ...] by input name; at most 64 records are used.
    The result is the largest difference of a probability, or of a value in standard deviations of
    the target. It is infinite if a label differs or a prediction is not finite.
    """
    most = min(max(BATCH_SIZES), num_rows(inputs))
    answers = []
    for size in BATCH_SIZES:
        parts = [slice(start, min(start + size, most)) for start in range(0, most, size)]
        outputs = [engine.run({name: array[p] for name, array in inputs.items()}) for p in parts]
        logits_NK = np.concatenate([part["logits"] for part in outputs])
        answers.append(task.target.decode({"logits": logits_NK}))
    scale = _scale(task)
    largest = 0.0
    for other in answers[1:]:
        for name, values in answers[0].items():
            if values.dtype == object:
                if any(a != b for a, b in zip(values, other[name], strict=True)):
                    return float("inf")
            else:
                difference = float(np.abs(values - other[name]).max()) / scale
                largest = max(largest, difference if np.isfinite(difference) else math.inf)
    return largest


def _change(task: Task, reference: Arrays, outputs: Arrays) -> float:
    before, after = task.target.decode(reference), task.target.decode(outputs)
    if "probabilities" in before:
        difference_NK = np.abs(after["probabilities"] - before["probabilities"])
        return float(difference_NK.sum(axis=1).mean() / 2)
    numbers = [name for name, values in before.items() if values.dtype != object]
    changes = [np.abs(after[name] - before[name]).mean() / _scale(task) for name in numbers]
    # np.max returns NaN if any change is NaN; the built-in max would not.
    return float(np.max(changes, initial=0.0))


def _scale(task: Task) -> float:
    return task.target.scale if isinstance(task.target, ValueTarget) else 1.0


def _agreement(task: Task, reference: Arrays, outputs: Arrays) -> float:
    before, after = task.target.decode(reference), task.target.decode(outputs)
    if "label" in before:
        return float(np.mean(before["label"] == after["label"]))
    numbers = [name for name, values in before.items() if values.dtype != object]
    return float(np.min([_explained(before[name], after[name]) for name in numbers], initial=1.0))


def _explained(before_N: np.ndarray, after_N: np.ndarray) -> float:
    spread = float(np.var(before_N))
    error = float(np.mean((after_N - before_N) ** 2))
    return 1 - error / spread if spread else float(error == 0)
