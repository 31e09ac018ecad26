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
    """Return float32 probabilities [N, K], each apart."""
    return (0.5 * (1 + np.tanh(0.5 * logits_NK))).astype(np.float32)


@dataclass(frozen=True)
class LabelsTarget(NamedTarget):
    """Any number of K labels at once: a list of names, or a text with a separator between them.

    counts: how many of the `num_records` training records each label has. separator: besides |,
    what stands between labels in the training records; found out by `fit`.
    """

    num_records: int = field(default=0, compare=False)
    separator: str = field(default=SEPARATOR, kw_only=True)

    kind: ClassVar[str] = "multilabel"
    loss: ClassVar[str] = "binary_cross_entropy"

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The F1 decides; with costs the cost."""
        cost = [Metric("cost", "lower")] if self.costs else []
        return (
            *cost,
            Metric("f1", "higher"),
            Metric("accuracy", "higher"),
            Metric("loss", "lower"),
        )

    def fit(self, values: Iterable[Any]) -> Self:
        """Take the labels, and what stands between them, from training values."""
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
        """Return uint8 [N, K] of 0 and 1. Raises InvalidRecord for an unknown label."""
        codes = {label: index for index, label in enumerate(self.classes)}
        chosen_NK = np.zeros((len(values), len(codes)), np.uint8)
        for row, value in enumerate(values):
            with with_row(row):
                for label in self._split(value):
                    if label not in codes:
                        raise InvalidRecord(
                            f"column '{self.column}' has '{label}', which is not among the "
                            f"training records; known are {', '.join(self.classes[:20])}; {GO_ON}."
                        )
                    chosen_NK[row, codes[label]] = 1
        return chosen_NK

    def decode(self, outputs: Arrays) -> Arrays:
        """{"logits": [N, K]} → {"label": object [N] of names with | between them,
        "probabilities": float32 [N, K]}; a label is given from its threshold on, 0.5 by default."""
        probabilities_NK = self.probabilities(outputs)
        labels = [
            SEPARATOR.join(self.classes[index] for index in np.flatnonzero(chosen_K))
            for chosen_K in self.choose(probabilities_NK)
        ]
        return {"label": np.array(labels, dtype=object), "probabilities": probabilities_NK}

    def probabilities(self, outputs: Arrays) -> np.ndarray:
        """{"logits": [N, K]} → float32 [N, K], each label's apart."""
        return sigmoid(outputs["logits"] / np.float32(self.temperature))

    def choose(self, probabilities_NK: np.ndarray) -> np.ndarray:
        """Which labels each record is said to have, bool [N, K]."""
        return probabilities_NK >= np.array(self.thresholds or (0.5,), np.float32)

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """F1 over all labels together, the share of records with all labels right, log loss.

        cost: the mean over records and labels.
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
        """The labels of one record; none where the value is missing."""
        try:
            return split_labels(value, self.separator)
        except ValueError as error:
            raise InvalidRecord(
                f"column '{self.column}' is {shorten(value)}, which {error}."
            ) from None
