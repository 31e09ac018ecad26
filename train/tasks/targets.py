"""Targets: the column to predict → numbers to learn, and a net's outputs → a prediction.

Shapes: N records, K names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from train.metrics import Metric
from train.values.names import NameForm, to_name
from train.values.records import Arrays, InvalidRecord, TensorSpec, shorten

# What a user may do about a record whose target cannot be learned.
GO_ON = "--data.bad_records drop leaves such records out"


class Target(Protocol):
    """How the column to predict is learned and how outputs are read back."""

    @property
    def column(self) -> str: ...

    @property
    def loss(self) -> str:
        """What a net learns by: a name in `train.nets.losses`, or package.module:function."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `decode` returns, in order."""
        ...

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """What `metrics` returns, and which way each is better; the first decides."""
        ...

    @property
    def num_outputs(self) -> int:
        """Width of the net's last layer."""
        ...

    def fit(self, values: Iterable[Any]) -> Self: ...

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray: ...

    def decode(self, outputs: Arrays) -> Arrays: ...

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]: ...

    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self: ...


@dataclass(frozen=True)
class NamedTarget:
    """A target of K names. counts: how many training records each has.

    temperature: what outputs are divided by before they become probabilities.
    costs: of the decision rule, what it costs to answer with the class of a column where the class
    of the row is true; of several labels, of saying no or yes to one. thresholds: the least
    probability at which a record is said to be of the rarer of two classes, or to have each label.
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
    """Return a class or label as text. Raises InvalidRecord for a value that cannot be a name."""
    try:
        return to_name(value, form)
    except ValueError as error:
        raise InvalidRecord(f"column '{column}' is {shorten(value)}, which {error}.") from None
