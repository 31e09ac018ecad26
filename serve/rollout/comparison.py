"""Compares two models on the same labelled records: is the second significantly better?

Shapes: N records.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from train.bundle import Bundle, Predictor
from train.data.reading import sources
from train.stats import sign_test
from train.tasks import Arrays, LabelsTarget, Metric, Task, ValueTarget
from train.values.label_lists import SEPARATOR
from train.values.records import encode_valid

# Records that are encoded at once. Of these, records of about equal length share a batch.
ENCODE_ROWS = 1024
# Significance level of the sign test.
MAX_P = 0.05
# Metrics in the unit of the target.
IN_UNITS = ("test_rmse", "test_mae", "test_quantile_loss")


@dataclass(frozen=True)
class PairedComparison:
    """The metrics of two models on the same records, and how many records changed.

    before, after: the metric of the first and of the second model. better, worse: records whose
    loss is smaller or larger with the second model. p: of the exact two-sided sign test on these
    records, which for classes is McNemar's test.
    """

    metric: str
    num_records: int
    before: float
    after: float
    better: int
    worse: int
    p: float

    @property
    def improved(self) -> bool:
        """Whether the second model is better in the metric and the test is significant."""
        gain = self.before - self.after if self.metric == "rmse" else self.after - self.before
        return gain > 0 and self.better > self.worse and self.p < MAX_P

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.after:.4f} against {self.before:.4f} on {self.num_records} new "
            f"records, {self.better} better and {self.worse} worse, p = {self.p:.2g}"
        )


def compare_predictors(before: Predictor, after: Predictor, records: pa.Table) -> PairedComparison:
    """Compare two predictors of one task on records with its feature and target columns.

    Records that cannot be encoded are skipped.
    """
    task = before.task
    batches = records.to_batches(max_chunksize=ENCODE_ROWS)
    losses_2N = np.concatenate([_losses(before, after, batch) for batch in batches], axis=1)
    return compare_losses(losses_2N, in_numbers=isinstance(task.target, ValueTarget))


def _losses(before: Predictor, after: Predictor, batch: pa.RecordBatch) -> np.ndarray:
    """Return the losses of both predictors, float64 [2, N]."""
    task, columns = before.task, sources.batch_columns(batch)
    features = {name: columns[name] for name in task.features.columns}
    inputs, kept_N, _ = encode_valid(task.features.encode, features, batch.num_rows)
    if inputs is None:
        return np.empty((2, 0))
    truths = batch.column(task.target.column).take(pa.array(kept_N)).to_pylist()
    found = [record_losses(task, each.run_many(inputs), truths) for each in (before, after)]
    return np.stack(found)


def compare_losses(losses_2N: np.ndarray, *, in_numbers: bool) -> PairedComparison:
    """Compare two models by their losses.

    losses_2N: float64 [2, N], of both models for each record. in_numbers: True if losses are
    squared errors, False if they are 1 for a wrong class and 0 otherwise.
    """
    before_N, after_N = losses_2N
    metric = "rmse" if in_numbers else "accuracy"
    before, after = (
        math.sqrt(each.mean()) if in_numbers else 1 - float(each.mean())
        for each in (before_N, after_N)
    )
    better, worse = int((after_N < before_N).sum()), int((after_N > before_N).sum())
    p = sign_test(better, worse)
    return PairedComparison(metric, losses_2N.shape[1], before, after, better, worse, p)


def record_losses(task: Task, answers: Arrays, truths: Sequence[Any]) -> np.ndarray:
    """Return each record's loss, float64 [N]: the squared error, or 1 for a wrong class.

    answers: a predictor's outputs, "value" or "label" [N]. truths: N labels.
    """
    if isinstance(task.target, ValueTarget):
        return np.square(answers["value"].astype(np.float64) - np.array(truths, np.float64))
    in_order = _in_order if isinstance(task.target, LabelsTarget) else str
    pairs = zip(answers["label"], truths, strict=True)
    return np.array([in_order(label) != in_order(truth) for label, truth in pairs], np.float64)


def _in_order(names: str) -> str:
    return SEPARATOR.join(sorted(name for name in names.split(SEPARATOR) if name))


def comparison_outcome(
    production: Bundle, candidate: Bundle, held_out: pa.Table, max_drop: float
) -> dict[str, Any]:
    """Return {"outcome": "registered" or "refused", "reason", "figures"} for a candidate.

    A candidate is registered if it is significantly better than production on the held-out new
    records and at most `max_drop` worse on the test records, which both bundles must share.
    """
    comparison = compare_predictors(Predictor.load(production), Predictor.load(candidate), held_out)
    metric, before, after = _on_test(production, candidate)
    drop = metric.signed({metric.name: before}) - metric.signed({metric.name: after})
    in_unit = drop / error_unit(production.task) if metric.name in IN_UNITS else drop
    figures = {
        **{f"new_{key}": value for key, value in comparison.to_dict().items()},
        metric.name: after,
        f"production_{metric.name}": before,
    }
    words = f"{comparison}; {metric.name} {after:.4f} against {before:.4f}"
    refused = None
    if not comparison.improved:
        refused = "not significantly better on new records"
    elif not _same_test(production, candidate):
        refused = "the test records have changed, so the metrics on them cannot be compared"
    elif not in_unit <= max_drop:  # written so that NaN is refused
        refused = f"more than {max_drop:g} worse on the old test records"
    reason = f"{refused}: {words}" if refused else words
    return {
        "outcome": "refused" if refused else "registered",
        "reason": reason,
        "figures": figures,
    }


def _on_test(production: Bundle, candidate: Bundle) -> tuple[Metric, float, float]:
    """Return the task's metric on the test split, for the default variants of both bundles."""
    metric = production.task.find_metric(f"test_{production.task.metric}")
    before, after = (
        bundle.manifest.variants[bundle.manifest.default_variant].metrics[metric.name]
        for bundle in (production, candidate)
    )
    return metric, before, after


def _same_test(production: Bundle, candidate: Bundle) -> bool:
    before, after = (bundle.manifest.data["test"] for bundle in (production, candidate))
    # Older bundles lack the digest of a split.
    return all(before[key] == after[key] for key in ("num_records", "digest") if key in before)


def error_unit(task: Task) -> float:
    """Return the unit of a task's errors: the target's standard deviation, or 1 for classes."""
    return task.target.scale if isinstance(task.target, ValueTarget) else 1.0
