"""Targets: the column to predict → numbers to learn, and a net's outputs → a prediction."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

import numpy as np

from train.tasks.records import Arrays, TensorSpec

# How the names of metrics end of which less is better.
LOWER_IS_BETTER = ("loss", "rmse", "mae")


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
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` returns; the first decides."""
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
