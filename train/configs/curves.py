"""A task of your own: predict a value from a curve, a list of numbers, with a net of your own.

An encoder makes arrays of records, a task says what decides, a net learns; curves.yaml names them.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

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
        for row, curve in enumerate(columns[self.column]):
            if len(curve) != self.length:
                raise InvalidRecord(f"'{self.column}' must have {self.length} numbers.", row)
        return {self.column: np.array(columns[self.column], np.float32)}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **vars(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(state["column"], state["length"])


class Curves(Task):
    metric = "mae"  # decides, in place of the target's first


class CurveNet(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 32, 5, padding=2)
        self.head = nn.Linear(64, task.target.num_outputs)

    def forward(self, curves_BL: Tensor) -> Tensor:
        x_BCL = torch.relu(self.conv(curves_BL[:, None]))
        return self.head(torch.cat([x_BCL.mean(dim=2), x_BCL.amax(dim=2)], dim=1))
