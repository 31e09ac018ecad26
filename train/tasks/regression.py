"""Targets that are numbers. Shapes: N records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from train.metrics import Metric, quantile_loss
from train.tasks.records import Arrays, InvalidRecord, TensorSpec, is_missing, shorten

# In deviations: errors beyond count no longer by their square.
HUBER = 0.5


@dataclass(frozen=True)
class ValueTarget:
    """A number. It is learned scaled by the training records, and given in its own unit.

    The loss is Huber's, squared up to half a deviation: a few far values would else rule the net.
    quantile: what is predicted in place of the middle, such as 0.9 for a value that nine records of
    ten stay below; the loss is then the quantile's.
    """

    column: str
    mean: float = 0.0
    scale: float = 0.0
    quantile: float | None = None

    kind: ClassVar[str] = "regression"
    outputs: ClassVar[tuple[TensorSpec, ...]] = (TensorSpec("value", "FP32", ()),)
    num_outputs: ClassVar[int] = 1

    @property
    def loss(self) -> str:
        return "huber" if self.quantile is None else "pinball"

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The coefficient of determination decides, or the quantile's loss."""
        found = [Metric("r2", "higher")]
        found += [Metric(name, "lower") for name in ("rmse", "mae", "quantile_loss", "loss")]
        if self.quantile is not None:
            found.sort(key=lambda metric: metric.name != "quantile_loss")
        return tuple(found)

    def fit(self, values: Iterable[Any]) -> Self:
        """Take mean and deviation. Raises InvalidRecord when all values are the same."""
        numbers_N = np.fromiter(self._numbers(values), np.float64)
        scale = float(numbers_N.std()) if len(numbers_N) else 0.0
        if scale == 0 or not math.isfinite(scale):
            raise InvalidRecord(
                f"column '{self.column}' has only the value {numbers_N[:1].tolist()}; "
                "expected at least two values."
            )
        return replace(self, mean=float(numbers_N.mean()), scale=scale)

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float32 [N], scaled. Raises InvalidRecord for what is no finite number."""
        numbers_N = np.fromiter(self._numbers(values), np.float64, len(values))
        return ((numbers_N - self.mean) / self.scale).astype(np.float32)

    def decode(self, outputs: Arrays) -> Arrays:
        """{"logits": [N, 1]} → {"value": float32 [N]} in the column's own unit."""
        return {"value": (outputs["logits"][:, 0] * self.scale + self.mean).astype(np.float32)}

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Coefficient of determination, errors in the column's unit, the loss.

        quantile_loss: of the quantile that is predicted, of 0.5 by default.
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

    def _numbers(self, values: Iterable[Any]) -> Iterable[float]:
        for row, value in enumerate(values):
            try:
                number = math.nan if is_missing(value) else float(value)
            except (ValueError, TypeError, OverflowError):
                number = math.nan
            if not math.isfinite(number):
                raise InvalidRecord(
                    f"column '{self.column}' is {shorten(value)}; expected a finite number.", row
                )
            yield number

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **vars(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(state["column"], state["mean"], state["scale"], state.get("quantile"))
