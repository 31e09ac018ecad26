"""The gate: a variant is served only if held-out records say that it may be."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.bundle.engines import Engine
from train.stats import bootstrap_interval, paired_interval
from train.tasks import Arrays, ClassTarget, Task
from train.tasks.regression import ValueTarget
from train.values.records import num_rows

# A count of records is never exactly a fraction of them.
EPSILON = 1e-9
# What the names of metrics of the validation split begin with.
VALID = "valid_"
# Metrics in the target's own unit, whatever that is.
IN_UNITS = ("rmse", "mae", "quantile_loss")
BATCH_SIZES = (1, 7, 64)
# How far an answer may depend on the batch it travelled in.
MAX_BATCH_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class VariantComparison:
    """A variant against fp32 on the same records.

    drop: how much worse the metric is, an error in standard deviations of the target; low, high:
    its 95 % confidence interval.
    agreement: share of records with the same answer; for numbers the R² of one by the other.
    change: mean difference of the answers: half the sum over probabilities, or of values in
    standard deviations of the target.
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
    """Compare a variant's outputs with fp32's for the same records.

    name: of the metric, such as "valid_loss"; the task's own by default. interval: whether its
    interval is needed, which takes a thousand draws of some metrics; it is NaN otherwise.
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
            # A draw whose metric is not a number counts as the worst.
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
    """Accept a variant that was measured to be at most `max_drop` worse than fp32.

    A larger one is refused if the whole interval is above `max_drop`, and undecided otherwise: more
    held-out records would decide. strict: accept only if the upper end of the interval is at most
    `max_drop`.
    max_change: for a form of the same net, whose answers must be those of fp32 but for rounding:
    wrong weights may leave the labels as they are, and the probabilities are nonsense.
    batch: the largest difference between the answers for a record in batches of several sizes.
    """
    c = comparison
    figures = (
        f"{c.metric} {c.value:.4f} against {c.reference:.4f} in fp32, "
        f"{c.drop:+.4f} worse [{c.low:+.4f}, {c.high:+.4f}], agreement {c.agreement:.4f}"
    )
    if not batch <= MAX_BATCH_DIFFERENCE:
        return GateVerdict(
            "refused",
            f"answers depend on the batch they travel in, by {batch:.2g} "
            f"(at most {MAX_BATCH_DIFFERENCE:g} is accepted); {figures}",
        )
    # A NaN compares false and is refused.
    if not c.change <= max_change:
        return GateVerdict(
            "refused",
            f"answers are others, by {c.change:.4f} in the mean (at most {max_change:g} is "
            f"accepted of the same net); {figures}",
        )
    if c.drop <= max_drop + EPSILON:
        if not strict or c.high <= max_drop + EPSILON:
            beyond = ", though the interval reaches beyond" if c.high > max_drop + EPSILON else ""
            return GateVerdict("accepted", f"{figures}: within {max_drop:g}{beyond}")
        return GateVerdict("undecided", f"{figures}: the interval reaches beyond {max_drop:g}")
    if not math.isnan(c.drop) and c.low <= max_drop + EPSILON:
        return GateVerdict(
            "undecided", f"{figures}: more than {max_drop:g}, which the interval does not exclude"
        )
    return GateVerdict("refused", f"{figures}: more than the accepted {max_drop:g}")


def batch_difference(task: Task, engine: Engine, inputs: Arrays) -> float:
    """Return how far answers for the same records differ between batches of 1, 7 and 64.

    The largest difference of a probability, or of a value in standard deviations of the target;
    infinite where a label differs, or a number is none.
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
    # Unlike max(), it keeps a NaN.
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
