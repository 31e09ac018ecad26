"""Targets that are any number of labels. Shapes: N records, K labels."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from train import metrics
from train.metrics import Metric
from train.tasks.targets import GO_ON, NamedTarget
from train.values.label_lists import SEPARATOR, find_separator, split_labels
from train.values.records import Arrays, InvalidRecord, shorten, with_row


def sigmoid(logits_NK: np.ndarray) -> np.ndarray:
    """Return independent probabilities, float32 [N, K], for logits, float [N, K]."""
    return (0.5 * (1 + np.tanh(0.5 * logits_NK))).astype(np.float32)


@dataclass(frozen=True)
class LabelsTarget(NamedTarget):
    """Target that is any number of K labels: a list of names, or text with a separator.

    counts: number of training records with each label, out of `num_records`. separator: separates
    labels in text, in addition to "|"; `fit` detects it.
    """

    num_records: int = field(default=0, compare=False)
    separator: str = field(default=SEPARATOR, kw_only=True)

    kind: ClassVar[str] = "multilabel"
    loss: ClassVar[str] = "binary_cross_entropy"

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The metrics that `metrics` returns, the main one first: F1, or the cost if it is set."""
        cost = [Metric("cost", "lower")] if self.costs else []
        return (
            *cost,
            Metric("f1", "higher"),
            Metric("accuracy", "higher"),
            Metric("loss", "lower"),
        )

    def fit(self, values: Iterable[Any]) -> Self:
        """Return the target with the labels and the separator of training values.

        Raises InvalidRecord if no value has a label, or a value cannot be read.
        """
        values = list(values)
        fitted = replace(self, separator=find_separator(values) or SEPARATOR)
        counts: Counter[str] = Counter()
        for row, value in enumerate(values):
            with with_row(row):
                counts.update(set(fitted._split(value)))
        if not counts:
            raise InvalidRecord(f"column '{self.column}' has no label in any record.")
        classes = tuple(sorted(counts))
        label_counts = tuple(counts[name] for name in classes)
        return replace(fitted, classes=classes, counts=label_counts, num_records=len(values))

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return uint8 [N, K], 1 where record n has label k.

        Raises InvalidRecord for a label that `fit` did not see or a value that cannot be read.
        """
        codes = {label: index for index, label in enumerate(self.classes)}
        chosen_NK = np.zeros((len(values), len(codes)), np.uint8)
        for row, value in enumerate(values):
            with with_row(row):
                for label in self._split(value):
                    if label not in codes:
                        raise InvalidRecord(
                            f"column '{self.column}' has '{label}', which is not among the labels "
                            f"in training; known are {', '.join(self.classes[:20])}; {GO_ON}."
                        )
                    chosen_NK[row, codes[label]] = 1
        return chosen_NK

    def decode(self, outputs: Arrays) -> Arrays:
        """Return {"label": object [N] of str, "probabilities": float32 [N, K]}.

        "label" has the labels whose probability reaches their threshold, separated by "|".
        outputs: {"logits": float [N, K]}.
        """
        probabilities_NK = self.probabilities(outputs)
        labels = [
            SEPARATOR.join(self.classes[index] for index in np.flatnonzero(chosen_K))
            for chosen_K in self.choose(probabilities_NK)
        ]
        return {"label": np.array(labels, dtype=object), "probabilities": probabilities_NK}

    def probabilities(self, outputs: Arrays) -> np.ndarray:
        """Return independent probabilities, float32 [N, K], calibrated by the temperature.

        outputs: {"logits": float [N, K]}.
        """
        return sigmoid(outputs["logits"] / np.float32(self.temperature))

    def choose(self, probabilities_NK: np.ndarray) -> np.ndarray:
        """Return which labels are predicted, bool [N, K]: those that reach their threshold.

        probabilities_NK: float32 [N, K]. A threshold is 0.5 unless the decision rule sets it.
        """
        return probabilities_NK >= np.array(self.thresholds or (0.5,), np.float32)

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Return all metrics in `known_metrics` by name.

        f1 counts all labels together; accuracy is the fraction of records with all labels right;
        loss is the log loss in nats; cost is the mean over records and labels.
        outputs: {"logits": float [N, K]}. targets: uint8 [N, K] of 0 and 1.
        """
        probabilities_NK = self.probabilities(outputs)
        chosen_NK, true_NK = self.choose(probabilities_NK), targets > 0
        wide_NK = probabilities_NK.astype(np.float64)
        values = {
            "f1": metrics.f1_score(true_NK, chosen_NK),
            "accuracy": float(np.mean(np.all(chosen_NK == true_NK, axis=1))),
            "loss": metrics.log_loss(np.where(true_NK, wide_NK, 1 - wide_NK)),
        }
        if self.costs:
            costs_22 = np.array(self.costs)
            values["cost"] = float(np.mean(costs_22[true_NK.astype(int), chosen_NK.astype(int)]))
        return values

    def _split(self, value: Any) -> list[str]:
        """Return the labels of one record, an empty list for a missing value."""
        try:
            return split_labels(value, self.separator)
        except ValueError as error:
            raise InvalidRecord(
                f"column '{self.column}' is {shorten(value)}, which {error}."
            ) from None
