"""A task of your own: predict a value from a curve, a list of numbers, with a net of your own.

An encoder makes arrays of records, a task says what decides, a net learns; curves.yaml names them.
The net is in a file of its own, curve_net.py, as serving needs no torch.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from train.tasks import Arrays, Columns, InvalidRecord, Task, TensorSpec


@dataclass(frozen=True)
class Curve:
    column: str
    length: int = 0
    kind: ClassVar[str] = "train.configs.curves:Curve"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.column, "FP32", (self.length,)),)

    inputs = fields

    def fit(self, columns: Columns) -> Self:
        return replace(self, length=len(columns[self.column][0]))

    def encode(self, columns: Columns) -> Arrays:
        curves_NL = np.zeros((len(columns[self.column]), self.length), np.float32)
        for row, curve in enumerate(columns[self.column]):
            try:
                curves_NL[row] = np.asarray(curve, np.float32).reshape(self.length)
            except (TypeError, ValueError):
                raise InvalidRecord(
                    f"'{self.column}' must be {self.length} numbers.", row
                ) from None
        return {self.column: curves_NL}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **vars(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(state["column"], state["length"])


class Curves(Task):
    metric = "mae"  # decides, in place of the target's first
