"""Example of a custom task: predict a value from a curve, which is a list of numbers.

It has three parts, which curves.yaml names: an encoder, which turns records into arrays; a task,
which sets the main metric; and a network. The network is in its own file, curve_net.py, because
serving imports this file and does not need torch. Shapes: N records, L length of a curve.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from train.tasks import Arrays, Columns, InvalidRecord, Task, TensorSpec


@dataclass(frozen=True)
class Curve:
    """Encoder of one column of curves; `fit` sets `length` to that of the first curve."""

    column: str
    length: int = 0
    kind: ClassVar[str] = "train.configs.curves:Curve"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.column, "FP32", (self.length,)),)

    inputs = fields

    def fit(self, columns: Columns) -> Self:
        """Return the encoder with the length of the first curve."""
        return replace(self, length=len(columns[self.column][0]))

    def encode(self, columns: Columns) -> Arrays:
        """Return {column: float32 [N, L]}. Raises InvalidRecord if a value is not L numbers."""
        curves_NL = np.zeros((len(columns[self.column]), self.length), np.float32)
        for row, curve in enumerate(columns[self.column]):
            try:
                curves_NL[row] = np.asarray(curve, np.float32).reshape(self.length)
            except (TypeError, ValueError):
                raise InvalidRecord(
                    f"field '{self.column}' must be a list of {self.length} numbers.", row
                ) from None
        return {self.column: curves_NL}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **vars(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(state["column"], state["length"])


class Curves(Task):
    """Regression whose main metric is the mean absolute error."""

    metric = "mae"  # instead of the target's first metric
