"""Tasks of models without features: requests hold the model's own tensors, responses its outputs.

Shapes: N records.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from train.metrics import Metric
from train.values.records import (
    DATATYPES,
    Arrays,
    Columns,
    InvalidRecord,
    TensorSpec,
    is_missing,
    shorten,
    to_text,
    with_row,
)


def _state(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": e.name, "datatype": e.datatype, "shape": list(e.shape)} for e in specs]


def _specs(states: Sequence[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(e["name"], e["datatype"], tuple(e["shape"])) for e in states)


@dataclass(frozen=True)
class Tensors:
    """Passes tensors on to the model, after a check of their type and shape."""

    tensors: tuple[TensorSpec, ...]

    kind: ClassVar[str] = "tensors"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return self.tensors

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.tensors

    def fit(self, columns: Columns) -> Self:
        """Return the encoder itself, which has nothing to fit."""
        return self

    def encode(self, columns: Columns) -> Arrays:
        """Return the tensors of N records by name, [N, …] each.

        Raises InvalidRecord for a missing value, or one of another type or shape.
        """
        return {spec.name: _read(spec, columns[spec.name]) for spec in self.tensors}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "tensors": _state(self.tensors)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(_specs(state["tensors"]))


def _read(spec: TensorSpec, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return values as an array of the spec, [N, …]."""
    if isinstance(values, np.ndarray) and values.dtype != np.dtype(object):
        if values.dtype != spec.dtype:
            raise InvalidRecord(_expected(spec, f"is {DATATYPES[values.dtype]}"), 0)
        if values.shape[1:] != spec.shape:
            raise InvalidRecord(_expected(spec, f"has the shape {list(values.shape[1:])}"), 0)
        return values
    rows = []
    for row, value in enumerate(values):
        with with_row(row):
            rows.append(_row(spec, value))
    return np.stack(rows) if rows else np.empty((0, *spec.shape), spec.dtype)


def _row(spec: TensorSpec, value: Any) -> np.ndarray:
    if is_missing(value) and spec.datatype != "BYTES":
        raise InvalidRecord(_expected(spec, "is missing"))
    if spec.datatype == "BYTES":
        found = np.array(value, object)
        texts = [to_text(each) for each in found.ravel()]
        found = np.array(texts, object).reshape(found.shape)
    else:
        try:
            given = np.array(value)
        except ValueError as error:
            raise InvalidRecord(_expected(spec, "has rows of several lengths")) from error
        floats = spec.dtype.kind == "f" and given.dtype.kind in "iuf"
        whole = spec.dtype.kind in "iu" and given.dtype.kind in "iu"
        if not (floats or whole or (spec.dtype.kind == given.dtype.kind == "b")):
            raise InvalidRecord(_expected(spec, f"is {shorten(value)}"))
        found = given.astype(spec.dtype)
        if whole and not np.array_equal(found, given):
            raise InvalidRecord(_expected(spec, f"is {shorten(value)}"))
    if found.shape != spec.shape:
        raise InvalidRecord(_expected(spec, f"has the shape {list(found.shape)}"))
    return found


def _expected(spec: TensorSpec, came: str) -> str:
    return f"field '{spec.name}' {came}; expected {spec.datatype} of the shape {list(spec.shape)}."


@dataclass(frozen=True)
class RawOutputs:
    """Returns the outputs of the model as they are. There is nothing to measure them by."""

    tensors: tuple[TensorSpec, ...]

    kind: ClassVar[str] = "tensors"
    column: ClassVar[str] = ""
    loss: ClassVar[str] = ""
    num_outputs: ClassVar[int] = 0
    known_metrics: ClassVar[tuple[Metric, ...]] = ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.tensors

    def fit(self, values: Iterable[Any]) -> Self:
        """Return the target itself, which has nothing to fit."""
        return self

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Raise InvalidRecord, whatever the values, [N]."""
        raise InvalidRecord("the model has no target, because it was imported without records")

    def decode(self, outputs: Arrays) -> Arrays:
        """Return the model's outputs by name, [N, …] each."""
        return {spec.name: outputs[spec.name] for spec in self.tensors}

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Return no metrics, whatever outputs and targets, [N, …]."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "tensors": _state(self.tensors)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(_specs(state["tensors"]))
