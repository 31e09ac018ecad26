"""Targets: the column to predict → a number to learn, and a net's outputs → a prediction."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from train.tasks.records import Arrays, InvalidRecord, TensorSpec


class Target(Protocol):
    """How the column to predict is learned and how outputs are read back."""

    @property
    def column(self) -> str: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `decode` returns, in order."""
        ...

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` returns; the first decides."""
        ...

    @property
    def num_outputs(self) -> int:
        """Width of the net's last layer."""
        ...

    def fit(self, values: Iterable[Any]) -> Self: ...

    def encode(self, value: Any) -> int | float: ...

    def decode(self, outputs: Arrays) -> Arrays: ...

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]: ...

    def to_dict(self) -> dict[str, Any]: ...


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Return float32 probabilities [N, K]; rows sum to 1."""
    exponents = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True), dtype=np.float32)
    return exponents / exponents.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class ClassTarget:
    """One of K classes. Labels may be strings or integers; a prediction's label is a string."""

    column: str
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("label", "BYTES", ()),
            TensorSpec("probabilities", "FP32", (len(self.classes),)),
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy", "loss")

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def fit(self, values: Iterable[Any]) -> Self:
        """Take the classes from training values: integers in their order, else by name.

        Raises InvalidRecord when fewer than two classes occur.
        """
        labels = {self.label(value) for value in values}
        # Classes named 0…9, 10… keep their order, so that class 10 does not come before class 2.
        by_number = all(re.fullmatch(r"-?[0-9]+", label) for label in labels)
        classes = tuple(sorted(labels, key=int if by_number else None))
        if len(classes) < 2:
            raise InvalidRecord(
                f"column '{self.column}' has only the value {list(classes)}; "
                "expected at least two classes."
            )
        return type(self)(self.column, classes)

    def encode(self, value: Any) -> int:
        """Return the index of the class. Raises InvalidRecord for one that training never saw."""
        label = self.label(value)
        try:
            return self.classes.index(label)
        except ValueError:
            raise InvalidRecord(
                f"column '{self.column}' is '{label}', a class that is not among the training "
                "records (or too rare to be in every split); "
                f"known are {', '.join(self.classes[:20])}{'…' * (len(self.classes) > 20)}."
            ) from None

    def decode(self, outputs: Arrays) -> Arrays:
        """{"logits": [N, K]} → {"label": object [N] of str, "probabilities": float32 [N, K]}."""
        probabilities_NK = softmax(outputs["logits"])
        labels_N = np.array(self.classes, dtype=object)[probabilities_NK.argmax(axis=1)]
        return {"label": labels_N, "probabilities": probabilities_NK}

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Accuracy, and log loss in nats, over N samples."""
        probabilities_NK = softmax(outputs["logits"])
        chosen_N = probabilities_NK[np.arange(len(targets)), targets]
        return {
            "accuracy": float(np.mean(probabilities_NK.argmax(axis=1) == targets)),
            "loss": float(-np.mean(np.log(np.maximum(chosen_N, 1e-12)))),
        }

    def label(self, value: Any) -> str:
        """Return the name of a class. Raises InvalidRecord for a missing value."""
        if value is None or (isinstance(value, float) and np.isnan(value)):
            raise InvalidRecord(f"column '{self.column}' is missing; expected a class label.")
        if isinstance(value, float | np.floating) and float(value).is_integer():
            value = int(value)
        return str(value)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "class", "column": self.column, "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(state["column"], tuple(state["classes"]))
