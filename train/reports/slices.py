"""Metrics of the test split by class and by slice of the records.

Shapes: N test records, K classes, labels or outputs.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from train.bundle import feature_statistics
from train.bundle.feature_statistics import MISSING_NAME, UNSEEN_NAME, QuantityValues
from train.stats import bootstrap_interval, wilson_interval
from train.tasks import (
    Arrays,
    Categories,
    ClassTarget,
    Images,
    LabelsTarget,
    NamedTarget,
    Numbers,
    Target,
    Task,
    Texts,
    ValueTarget,
)
from train.values.ragged import StoredArrays

# Smaller slices are not reported, because their metric is too uncertain.
LEAST_RECORDS = 20
# Larger test splits are sampled down to this many records.
MAX_RECORDS = 50_000
MAX_SLICES = 30
# Numbers with at most this many distinct values are sliced by value, others by quartile.
FEW_VALUES = 4
BATCH_SIZE = 1024
RESAMPLES = 200


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class or label. support: number of test records that have it."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Slice:
    """The metric of a slice of the test records, with its 95 % confidence interval.

    quantity, values: the sliced quantity and its range or value in this slice.
    """

    quantity: str
    values: str
    count: int
    figure: float
    low: float
    high: float


def class_metrics(target: Target, outputs: Arrays, targets: np.ndarray) -> list[ClassMetrics]:
    """Return precision, recall and F1 of each class or label; empty for other targets.

    outputs: {"logits": float32 [N, K]}. targets: class indices, int64 [N], or labels, uint8 [N, K].
    A ratio with denominator 0, such as the precision of a class that is never predicted, is 0.
    """
    if not isinstance(target, NamedTarget):
        return []
    probabilities_NK = target.decode(outputs)["probabilities"]
    if isinstance(target, ClassTarget):
        names_K = np.arange(len(target.classes))
        chosen_NK = target.choose(probabilities_NK)[:, None] == names_K
        true_NK = np.asarray(targets)[:, None] == names_K
    else:
        assert isinstance(target, LabelsTarget)
        chosen_NK, true_NK = target.choose(probabilities_NK), np.asarray(targets) > 0
    hits_K = (chosen_NK & true_NK).sum(axis=0)
    chosen_K, true_K = chosen_NK.sum(axis=0), true_NK.sum(axis=0)
    return [
        ClassMetrics(
            name,
            float(hits / max(chosen, 1)),
            float(hits / max(support, 1)),
            float(2 * hits / max(chosen + support, 1)),
            int(support),
        )
        for name, hits, chosen, support in zip(
            target.classes, hits_K, chosen_K, true_K, strict=True
        )
    ]


def slice_metric(target: Target) -> str | None:
    """Return the metric of slices: "accuracy", "rmse", or None if neither suits the target."""
    if isinstance(target, ClassTarget | LabelsTarget):
        return "accuracy"
    return "rmse" if isinstance(target, ValueTarget) else None


def worst_slices(
    task: Task, inputs: StoredArrays, targets: np.ndarray, outputs: Arrays
) -> list[Slice]:
    """Return the slices that are worse than the whole test split, the worst first.

    A slice is worse if its whole confidence interval is. Arguments as in `all_slices`: inputs
    [N, ...], targets [N] or [N, K], outputs {"logits": [N, K]}.
    """
    metric = slice_metric(task.target)
    if metric is None:
        return []
    whole, _, _ = _figure(metric, _losses(task.target, outputs, targets)[_rows(len(targets))])
    return [
        each
        for each in all_slices(task, inputs, targets, outputs)
        if (each.low > whole if metric == "rmse" else each.high < whole)
    ][:MAX_SLICES]


def all_slices(
    task: Task, inputs: StoredArrays, targets: np.ndarray, outputs: Arrays
) -> list[Slice]:
    """Return all slices with at least LEAST_RECORDS test records, the worst first.

    There is a slice for each category of a column, for each quartile of a number (or value, if
    there are few), of an image's brightness and of a text's length, and for missing values.
    inputs: encoded arrays [N, ...] by name. targets: encoded targets, [N] or, for multilabel tasks,
    uint8 [N, K]. outputs: {"logits": float32 [N, K]}.
    """
    metric = slice_metric(task.target)
    if metric is None:
        return []
    rows = _rows(len(targets))
    losses_N = _losses(task.target, outputs, targets)[rows]
    found = []
    for quantity, measured in _measured(task, inputs, rows).items():
        for values, chosen_N in _groups(task, quantity, measured):
            if LEAST_RECORDS <= chosen_N.sum() < len(rows):
                figures = _figure(metric, losses_N[chosen_N])
                found.append(Slice(quantity, values, int(chosen_N.sum()), *figures))
    sign = -1 if metric == "rmse" else 1
    return sorted(found, key=lambda each: sign * each.figure)


def _rows(count: int) -> np.ndarray:
    if count <= MAX_RECORDS:
        return np.arange(count)
    return np.sort(np.random.Generator(np.random.Philox(0)).permutation(count)[:MAX_RECORDS])


def _losses(target: Target, outputs: Arrays, targets: np.ndarray) -> np.ndarray:
    """Return 1 for wrong and 0 for right predictions, or squared errors of values: float64 [N]."""
    answers = target.decode(outputs)
    if isinstance(target, ClassTarget):
        wrong_N = target.choose(answers["probabilities"]) != np.asarray(targets)
    elif isinstance(target, LabelsTarget):
        chosen_NK = target.choose(answers["probabilities"])
        wrong_N = np.any(chosen_NK != (np.asarray(targets) > 0), axis=1)
    else:
        assert isinstance(target, ValueTarget)
        true_N = np.asarray(targets, np.float64) * target.scale + target.mean
        return (answers["value"] - true_N) ** 2
    return wrong_N.astype(float)


def _figure(metric: str, losses_N: np.ndarray) -> tuple[float, float, float]:
    """Return the metric of a slice and the ends of its confidence interval."""
    if metric == "accuracy":
        count = len(losses_N)
        right = count - int(losses_N.sum())
        return right / count, *wilson_interval(right, count)
    low, high = bootstrap_interval(
        lambda rows: math.sqrt(losses_N[rows].mean()), len(losses_N), resamples=RESAMPLES
    )
    return math.sqrt(losses_N.mean()), low, high


def _measured(task: Task, inputs: StoredArrays, rows: np.ndarray) -> dict[str, QuantityValues]:
    """Return the values of each quantity to slice by, for the records `rows`."""
    wanted = _wanted(task)
    if not wanted:
        return {}
    parts = []
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        batch = {name: np.asarray(array[part]) for name, array in inputs.items()}
        parts.append(feature_statistics.measure_quantities(task, batch, None))
    return {
        name: QuantityValues(
            each.kind, each.of, np.concatenate([part[name].values for part in parts]), each.labels
        )
        for name, each in parts[0].items()
        if name in wanted
    }


def _wanted(task: Task) -> set[str]:
    """Return the quantities to slice by. The periodic features of dates are not among them."""
    names: set[str] = set()
    for encoder in task.features.encoders:
        if isinstance(encoder, Numbers):
            places = zip(encoder.names, encoder.owners, strict=True)
            names |= {name for name, owner in places if name == owner or " - " in name}
        elif isinstance(encoder, Categories):
            names |= set(encoder.columns)
        elif isinstance(encoder, Images):
            names.add(f"{encoder.column}.brightness")
            if encoder.has_free_height:
                names.add(f"{encoder.column}.height")
        elif isinstance(encoder, Texts):
            names.add(f"{'+'.join(encoder.columns)}.length")
    return names


def _groups(
    task: Task, quantity: str, measured: QuantityValues
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each slice by one quantity, and a mask of its records, bool [N]."""
    values_N = measured.values
    if measured.kind == "category":
        names = _names(task)[quantity]
        for code in np.unique(values_N):
            yield names[code], values_N == code
        return
    known_N = ~np.isnan(values_N)
    if not known_N.all():
        yield MISSING_NAME, ~known_N
    if not known_N.any():
        return
    rounded_N = _rounded(values_N)
    different = np.unique(rounded_N[known_N])
    if len(different) <= FEW_VALUES:
        for value in different:
            yield _shown(task, quantity, value), rounded_N == value
        return
    uppers = np.unique(np.quantile(rounded_N[known_N], [0.25, 0.5, 0.75, 1]))
    # If at least a quarter of the records have the minimum, it is a slice of its own.
    least = f"{different[0]:.4g}"
    first = least if uppers[0] == different[0] else f"from {least} to {uppers[0]:.4g}"
    yield first, rounded_N <= uppers[0]
    for low, high in pairwise(uppers):
        yield f"above {low:.4g} to {high:.4g}", (rounded_N > low) & (rounded_N <= high)


def _rounded(values_N: np.ndarray) -> np.ndarray:
    """Round to six digits of the largest value: scaling for the network loses the others."""
    largest = float(np.nanmax(np.abs(values_N))) or 1.0
    return np.round(values_N, 5 - math.floor(math.log10(largest))) + 0.0


def _names(task: Task) -> Mapping[str, tuple[str, ...]]:
    """Return the names of all codes by column; a baseline contains only the frequent ones."""
    return {
        column: (UNSEEN_NAME, MISSING_NAME, *names)
        for encoder in task.features.encoders
        if isinstance(encoder, Categories)
        for column, names in zip(encoder.columns, encoder.names_C, strict=True)
    }


def _shown(task: Task, quantity: str, value: float) -> str:
    truths = {field.name for field in task.features.fields if field.datatype == "BOOL"}
    return str(bool(value)).lower() if quantity in truths else f"{value:.4g}"
