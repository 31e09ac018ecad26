"""Targets: encode the column to predict for training, and decode a network's outputs.

Shapes: N records, K classes or labels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from train.metrics import Metric
from train.values.names import NameForm, to_name
from train.values.records import Arrays, InvalidRecord, TensorSpec, shorten

# Remedy for records with an invalid target; part of error messages.
GO_ON = "--data.bad_records drop leaves such records out"


class Target(Protocol):
    """Encodes the column to predict for training, and decodes outputs into predictions."""

    @property
    def column(self) -> str:
        """Name of the column to predict."""
        ...

    @property
    def loss(self) -> str:
        """The training loss: a name in `train.nets.losses`, or package.module:function."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `decode` returns, in order."""
        ...

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The metrics that `metrics` returns, with their directions; the main one is first."""
        ...

    @property
    def num_outputs(self) -> int:
        """Width of the network's last layer."""
        ...

    def fit(self, values: Iterable[Any]) -> Self:
        """Return the target fitted to training values. Raises InvalidRecord."""
        ...

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return N values as an array to learn, [N] or [N, K]. Raises InvalidRecord."""
        ...

    def decode(self, outputs: Arrays) -> Arrays:
        """Return the predictions by name, each [N, …] as `outputs` describes it.

        outputs: {"logits": float [N, num_outputs]}.
        """
        ...

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Return all metrics in `known_metrics` by name.

        outputs: {"logits": float [N, num_outputs]}. targets: [N] or [N, K], from `encode`.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, with the "kind" by which the class is found."""
        ...

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Return the target of a state that `to_dict` returned."""
        ...


@dataclass(frozen=True)
class NamedTarget:
    """Base of targets with K names, which are classes or labels.

    counts: number of training records of each class or with each label.
    temperature: divisor of the logits, which calibrates the probabilities.
    costs: [true class][predicted class], the cost of each decision; for labels [no, yes][no, yes].
    thresholds: smallest probability for the prediction of the rarer of two classes, or of each
    label. Costs and thresholds come from the decision rule; they are empty without one.
    """

    column: str
    classes: tuple[str, ...] = ()
    counts: tuple[int, ...] = field(default=(), compare=False)
    temperature: float = field(default=1.0, compare=False, kw_only=True)
    costs: tuple[tuple[float, ...], ...] = field(default=(), compare=False, kw_only=True)
    thresholds: tuple[float, ...] = field(default=(), compare=False, kw_only=True)

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
        names = ("classes", "counts", "thresholds")
        lists = {name: list(getattr(self, name)) for name in names}
        return {
            "kind": self.kind,
            **vars(self),
            **lists,
            "costs": [list(row) for row in self.costs],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        given = {name: value for name, value in state.items() if name != "kind"}
        names = ("classes", "counts", "thresholds")
        tuples = {name: tuple(given.get(name, ())) for name in names}
        costs = tuple(map(tuple, given.get("costs", ())))
        return cls(**{**given, **tuples, "costs": costs})


def label_name(column: str, value: Any, form: NameForm = "text") -> str:
    """Return a class or label as text. Raises InvalidRecord if the value cannot be a name."""
    try:
        return to_name(value, form)
    except ValueError as error:
        raise InvalidRecord(f"column '{column}' is {shorten(value)}, which {error}.") from None
