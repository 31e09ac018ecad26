"""Targets that are numbers. Shapes: N records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, ClassVar, Self

import numpy as np

from train.metrics import Metric, quantile_loss
from train.tasks.columns.numeric import FARTHEST
from train.tasks.columns.scalars import Number
from train.tasks.targets import GO_ON
from train.values.records import Arrays, InvalidRecord, TensorSpec, shorten
from train.values.sentinels import robust_mean_scale

# In standard deviations of the target: larger errors count linearly instead of squared.
HUBER = 0.5
# Number of values that are read at once, which bounds the memory of `fit`.
PART = 50_000


@dataclass(frozen=True)
class ValueTarget:
    """Target that is a number. The network learns it scaled; predictions are in its own unit.

    mean, scale: mean and standard deviation of the training values; a few extreme outliers do not
    move them.
    quantile: the quantile to predict, such as 0.9 for a value that nine of ten records stay below.
    The loss is then the pinball loss; without a quantile it is the Huber loss, so that outliers do
    not dominate training.
    decimal, unit: how numbers are written as text, see NumberFormat; `fit` detects them if None.
    """

    column: str
    mean: float = 0.0
    scale: float = 0.0
    quantile: float | None = None
    decimal: str | None = None
    unit: str | None = None

    kind: ClassVar[str] = "regression"
    outputs: ClassVar[tuple[TensorSpec, ...]] = (TensorSpec("value", "FP32", ()),)
    num_outputs: ClassVar[int] = 1

    @property
    def loss(self) -> str:
        return "huber" if self.quantile is None else "pinball"

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The metrics that `metrics` returns, the main one first.

        The main metric is the coefficient of determination R², or with a quantile its loss.
        """
        found = [Metric("r2", "higher")]
        found += [Metric(name, "lower") for name in ("rmse", "mae", "quantile_loss", "loss")]
        if self.quantile is not None:
            found.sort(key=lambda metric: metric.name != "quantile_loss")
        return tuple(found)

    def fit(self, values: Iterable[Any]) -> Self:
        """Return the target with the number format, mean and scale of training values.

        Raises InvalidRecord if all values are the same, or one is not a finite number.
        """
        rest = iter(values)
        first = list(islice(rest, PART))
        number = Number(self.column, self.decimal, self.unit, missing=()).fit(first)
        fitted = replace(self, decimal=number.decimal, unit=number.unit)
        numbers_N = fitted._numbers(chain(first, rest))
        if not len(numbers_N) or numbers_N.min() == numbers_N.max():
            raise InvalidRecord(
                f"column '{self.column}' has only the value {numbers_N[:1].tolist()}; "
                "expected at least two values."
            )
        mean, scale = robust_mean_scale(numbers_N)
        return replace(fitted, mean=mean, scale=scale)

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return scaled values, float32 [N], clipped to ±FARTHEST standard deviations.

        Raises InvalidRecord for a value that is not a finite number.
        """
        with np.errstate(over="ignore"):
            scaled_N = (self._numbers(values) - self.mean) / self.scale
        return np.clip(scaled_N, -FARTHEST, FARTHEST).astype(np.float32)

    def decode(self, outputs: Arrays) -> Arrays:
        """Return {"value": float32 [N]}, in the unit of the column.

        outputs: {"logits": float [N, 1]}.
        """
        return {"value": (outputs["logits"][:, 0] * self.scale + self.mean).astype(np.float32)}

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Return all metrics in `known_metrics` by name.

        r2 is the coefficient of determination. rmse, mae and quantile_loss are in the unit of the
        column; quantile_loss is that of `quantile`, by default 0.5. loss is the training loss, of
        scaled values.
        outputs: {"logits": float [N, 1]}. targets: scaled values, float [N].
        """
        error_N = outputs["logits"][:, 0].astype(np.float64) - targets
        spread = float(np.var(targets.astype(np.float64)))
        squared, size_N = float(np.mean(error_N**2)), np.abs(error_N)
        of_quantile = quantile_loss(-error_N, 0.5 if self.quantile is None else self.quantile)
        linear_N = HUBER * (size_N - HUBER / 2)
        huber = float(np.mean(np.where(size_N < HUBER, error_N**2 / 2, linear_N)))
        return {
            "r2": 1 - squared / spread if spread > 0 else 0.0,
            "rmse": math.sqrt(squared) * self.scale,
            "mae": float(np.mean(np.abs(error_N))) * self.scale,
            "quantile_loss": of_quantile * self.scale,
            "loss": huber if self.quantile is None else of_quantile,
        }

    def _numbers(self, values: Iterable[Any] | np.ndarray) -> np.ndarray:
        """Return values, float64 [N]. Raises InvalidRecord if one is not a finite number."""
        number = Number(self.column, self.decimal, self.unit, missing=())
        if isinstance(values, np.ndarray):
            return self._finite(number, values, 0)
        parts, start, rest = [np.empty(0)], 0, iter(values)
        while part := list(islice(rest, PART)):
            parts.append(self._finite(number, part, start))
            start += len(part)
        return np.concatenate(parts)

    def _finite(self, number: Number, values: Sequence[Any] | np.ndarray, start: int) -> np.ndarray:
        try:
            numbers_N = number.read(values)
            row = int(np.argmax(np.isnan(numbers_N))) if np.isnan(numbers_N).any() else None
        except InvalidRecord as error:
            row = error.row
        if row is not None:
            raise InvalidRecord(
                f"column '{self.column}' is {shorten(values[row])}; expected a finite number. "
                f"{GO_ON}.",
                start + row,
            ) from None
        return numbers_N

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **vars(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(**{name: value for name, value in state.items() if name != "kind"})
