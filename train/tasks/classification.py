"""Targets that are names: one class of each record, or any number of labels.

Shapes: N records, K names.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from train.tasks.records import (
    Arrays,
    InvalidRecord,
    TensorSpec,
    category_name,
    is_missing,
    shorten,
    with_row,
)

# What several labels of a record are written with between them.
SEPARATOR = "|"


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Return float32 probabilities [N, K]; rows sum to 1."""
    exponents = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True), dtype=np.float32)
    return exponents / exponents.sum(axis=1, keepdims=True)


def sigmoid(logits_NK: np.ndarray) -> np.ndarray:
    """Return float32 probabilities [N, K], each apart."""
    return (0.5 * (1 + np.tanh(0.5 * logits_NK))).astype(np.float32)


@dataclass(frozen=True)
class NamedTarget:
    """A target of K names. counts: how many training records each has.

    temperature: what outputs are divided by before they become probabilities.
    """

    column: str
    classes: tuple[str, ...] = ()
    counts: tuple[int, ...] = field(default=(), compare=False)
    temperature: float = field(default=1.0, compare=False, kw_only=True)

    kind: ClassVar[str]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("label", "BYTES", ()),
            TensorSpec("probabilities", "FP32", (len(self.classes),)),
        )

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        lists = {"classes": list(self.classes), "counts": list(self.counts)}
        return {"kind": self.kind, **vars(self), **lists}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        given = {name: value for name, value in state.items() if name != "kind"}
        tuples = {name: tuple(given[name]) for name in ("classes", "counts")}
        return cls(**{**given, **tuples})


@dataclass(frozen=True)
class ClassTarget(NamedTarget):
    """One of K classes. Labels may be strings or integers; a prediction's label is a string.

    counts: how many training records each class has.
    """

    kind: ClassVar[str] = "classification"
    loss: ClassVar[str] = "cross_entropy"

    @property
    def metric_names(self) -> tuple[str, ...]:
        names = ("accuracy", "loss")
        return (*names, "auc") if len(self.classes) == 2 else names

    def fit(self, values: Iterable[Any]) -> Self:
        """Take the classes from training values: integers in their order, else by name.

        Raises InvalidRecord when fewer than two classes occur.
        """
        counts = Counter(self._labels(values))
        # Classes named 0…9, 10… keep their order, so that class 10 does not come before class 2.
        by_number = all(re.fullmatch(r"-?[0-9]+", label) for label in counts)
        classes = tuple(sorted(counts, key=int if by_number else None))
        if len(classes) < 2:
            raise InvalidRecord(
                f"column '{self.column}' has only the value {list(classes)}; "
                "expected at least two classes."
            )
        return replace(self, classes=classes, counts=tuple(counts[name] for name in classes))

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return the index of each class, int64 [N]. Raises InvalidRecord for an unknown one."""
        codes = {label: index for index, label in enumerate(self.classes)}
        indices = np.zeros(len(values), np.int64)
        for row, label in enumerate(self._labels(values)):
            if label not in codes:
                raise InvalidRecord(
                    f"column '{self.column}' is '{label}', a class that is not among the training "
                    "records (or too rare to be in every split); known are "
                    f"{', '.join(self.classes[:20])}{'…' * (len(self.classes) > 20)}.",
                    row,
                )
            indices[row] = codes[label]
        return indices

    def decode(self, outputs: Arrays) -> Arrays:
        """{"logits": [N, K]} → {"label": object [N] of str, "probabilities": float32 [N, K]}."""
        probabilities_NK = softmax(outputs["logits"] / np.float32(self.temperature))
        labels_N = np.array(self.classes, dtype=object)[probabilities_NK.argmax(axis=1)]
        return {"label": labels_N, "probabilities": probabilities_NK}

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Accuracy, log loss in nats, and of two classes the area under the ROC curve."""
        probabilities_NK = softmax(outputs["logits"] / np.float32(self.temperature))
        chosen_N = probabilities_NK[np.arange(len(targets)), targets]
        values = {
            "accuracy": float(np.mean(probabilities_NK.argmax(axis=1) == targets)),
            "loss": float(-np.mean(np.log(np.maximum(chosen_N, 1e-12)))),
        }
        if len(self.classes) == 2:
            values["auc"] = _auc(targets, probabilities_NK[:, 1])
        return values

    def _labels(self, values: Iterable[Any]) -> Iterable[str]:
        for row, value in enumerate(values):
            if is_missing(value):
                raise InvalidRecord(
                    f"column '{self.column}' is missing; expected a class label.", row
                )
            with with_row(row):
                yield _label(self.column, value)


@dataclass(frozen=True)
class LabelsTarget(NamedTarget):
    """Any number of K labels at once: a list of names, or a text with | between them.

    counts: how many of the `num_records` training records each label has.
    """

    num_records: int = field(default=0, compare=False)

    kind: ClassVar[str] = "multilabel"
    loss: ClassVar[str] = "binary_cross_entropy"
    metric_names: ClassVar[tuple[str, ...]] = ("f1", "accuracy", "loss")

    def fit(self, values: Iterable[Any]) -> Self:
        counts: Counter[str] = Counter()
        count = 0
        for row, value in enumerate(values):
            with with_row(row):
                counts.update(set(self._split(value)))
            count += 1
        if not counts:
            raise InvalidRecord(f"column '{self.column}' has no label in any record.")
        classes = tuple(sorted(counts))
        label_counts = tuple(counts[name] for name in classes)
        return replace(self, classes=classes, counts=label_counts, num_records=count)

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
                            f"training records; known are {', '.join(self.classes[:20])}."
                        )
                    chosen_NK[row, codes[label]] = 1
        return chosen_NK

    def decode(self, outputs: Arrays) -> Arrays:
        """{"logits": [N, K]} → {"label": object [N] of names with | between them,
        "probabilities": float32 [N, K]}; a label is given from 0.5."""
        probabilities_NK = sigmoid(outputs["logits"] / np.float32(self.temperature))
        labels = [
            SEPARATOR.join(self.classes[index] for index in np.flatnonzero(row >= 0.5))
            for row in probabilities_NK
        ]
        return {"label": np.array(labels, dtype=object), "probabilities": probabilities_NK}

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """F1 over all labels together, the share of records with all labels right, log loss."""
        logits_NK = outputs["logits"] / np.float32(self.temperature)
        probabilities_NK = sigmoid(logits_NK).astype(np.float64)
        chosen_NK, true_NK = probabilities_NK >= 0.5, targets > 0
        hits = np.sum(chosen_NK & true_NK)
        likely_NK = np.where(true_NK, probabilities_NK, 1 - probabilities_NK)
        return {
            "f1": float(2 * hits / max(chosen_NK.sum() + true_NK.sum(), 1)),
            "accuracy": float(np.mean(np.all(chosen_NK == true_NK, axis=1))),
            "loss": float(-np.mean(np.log(np.maximum(likely_NK, 1e-12)))),
        }

    def _split(self, value: Any) -> list[str]:
        """The labels of one record; none where the value is missing."""
        if isinstance(value, list | tuple | np.ndarray):
            return [_label(self.column, item) for item in value]
        if is_missing(value):
            return []
        words = _label(self.column, value)
        if words.startswith("["):
            try:
                return [_label(self.column, item) for item in json.loads(words)]
            except json.JSONDecodeError:
                pass
        return [word.strip() for word in words.split(SEPARATOR) if word.strip()]


def _label(column: str, value: Any) -> str:
    try:
        return category_name(value)
    except ValueError as error:
        raise InvalidRecord(f"column '{column}' is {shorten(value)}, which {error}.") from None


def _auc(targets_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the ROC curve; 0.5 where only one class occurs."""
    if len(np.unique(targets_N)) < 2:
        return 0.5
    import sklearn.metrics  # takes a second, and serving needs none of it

    return float(sklearn.metrics.roc_auc_score(targets_N, scores_N))
