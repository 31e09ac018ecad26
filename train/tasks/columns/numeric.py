"""Numeric features: all columns that become numbers, encoded as one array.

The array is float32 [N, F]. NaN stands for a missing value, so that a network can learn from it.
Shapes: N records, F numbers per record.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.scalars import Boolean, Date, Number
from train.values.records import Arrays, Columns, InvalidRecord, TensorSpec
from train.values.sentinels import robust_mean_scale

DAY_S = 86_400.0
YEAR_S = 365.2425 * DAY_S
# Bound of scaled numbers, in standard deviations; larger ones are clipped.
FARTHEST = 1e6

Column = Number | Boolean | Date | Vector | LabelSet
COLUMNS: dict[str, type[Column]] = {
    kind.kind: kind for kind in (Number, Boolean, Date, Vector, LabelSet)
}


@dataclass(frozen=True)
class Numbers:
    """Encodes columns of numbers, booleans, dates, vectors and sets as one array, float32 [N, F].

    A number or boolean becomes one number; a date seven (see `names`), and each date after the
    first an eighth, the seconds since the first date; a vector one for each of its numbers; a set
    one for each label. Each of the F numbers is scaled by its mean and standard deviation over the
    training records.

    mean_F, scale_F: these means and standard deviations, robust against outliers.
    with_missing_F: whether each number is missing in some training record.
    raw: leave numbers as they are, float64, for an imported model that prepares them itself.
    required: columns of which such a model does not accept missing values.
    """

    columns: tuple[Column, ...]
    mean_F: tuple[float, ...] = ()
    scale_F: tuple[float, ...] = ()
    with_missing_F: tuple[bool, ...] = ()
    raw: bool = False
    required: tuple[str, ...] = ()

    kind: ClassVar[str] = "numbers"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(each.column, each.datatype, getattr(each, "shape", ()))
            for each in self.columns
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.kind, "FP64" if self.raw else "FP32", (len(self.names),)),)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the F numbers, such as "age", "pickup.day_sin" or "tags=red"."""
        return tuple(name for _, name in self._places)

    @property
    def owners(self) -> tuple[str, ...]:
        """The column that each of the F numbers comes from."""
        return tuple(column for column, _ in self._places)

    @property
    def _places(self) -> list[tuple[str, str]]:
        """Column and name of each of the F numbers."""
        places: list[tuple[str, str]] = []
        first = None
        parts = ("trend", "day_sin", "day_cos", "week_sin", "week_cos", "year_sin", "year_cos")
        for each in self.columns:
            column = each.column
            if isinstance(each, Vector | LabelSet):
                places += [(column, place) for place in each.places]
                continue
            if not isinstance(each, Date):
                places.append((column, column))
                continue
            places += [(column, f"{column}.{part}") for part in parts]
            if first is not None:
                places.append((column, f"{column} - {first}"))
            first = first or column
        return places

    def fit(self, columns: Columns) -> Self:
        """Return the encoder with columns, means and scales fitted to training records.

        Raises InvalidRecord if a value cannot be read.
        """
        fitted = replace(
            self,
            columns=tuple(
                each if isinstance(each, Boolean | Date) else each.fit(columns[each.column])
                for each in self.columns
            ),
        )
        raw_FN = fitted._raw(columns).T
        found = [robust_mean_scale(values_N[np.isfinite(values_N)]) for values_N in raw_FN]
        mean_F, scale_F = zip(*found, strict=True)
        with_missing_F = tuple(np.isnan(raw_FN).any(axis=1).tolist())
        return replace(fitted, mean_F=mean_F, scale_F=scale_F, with_missing_F=with_missing_F)

    def missing(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return by column which values count as missing, bool [N]. Raises InvalidRecord."""
        read = {each.column: each.read(columns[each.column]) for each in self.columns}
        return {
            column: np.isnan(values.reshape(len(values), -1)).all(axis=1)
            for column, values in read.items()
        }

    def encode(self, columns: Columns) -> Arrays:
        """Return {"numbers": float32 [N, F]}, float64 if `raw`. Raises InvalidRecord."""
        if self.raw:
            raw_NF = self._raw(columns)
            self._check_required(raw_NF)
            return {self.kind: raw_NF}
        assert self.mean_F, "fit first"
        # float64 keeps the differences between large numbers.
        with np.errstate(over="ignore"):
            scaled_NF = (self._raw(columns) - np.array(self.mean_F)) / np.array(self.scale_F)
        return {self.kind: np.clip(scaled_NF, -FARTHEST, FARTHEST).astype(np.float32)}

    def _check_required(self, raw_NF: np.ndarray) -> None:
        for owner, values_N in zip(self.owners, raw_NF.T, strict=True):
            if owner in self.required and (unknown_N := np.isnan(values_N)).any():
                raise InvalidRecord(
                    f"field '{owner}' is missing, and the model needs a value.",
                    int(unknown_N.argmax()),
                )

    def _raw(self, columns: Columns) -> np.ndarray:
        """Return the numbers before scaling, float64 [N, F]; dates are in seconds."""
        parts: list[np.ndarray] = []
        first_N = None
        for each in self.columns:
            values_N = each.read(columns[each.column])
            if values_N.ndim == 2:
                parts += list(values_N.T)
                continue
            if not isinstance(each, Date):
                parts.append(values_N)
                continue
            parts.append(values_N)
            for period_s in (DAY_S, 7 * DAY_S, YEAR_S):
                angle_N = 2 * np.pi * (values_N / period_s)
                parts += [np.sin(angle_N), np.cos(angle_N)]
            if first_N is not None:
                parts.append(values_N - first_N)
            first_N = values_N if first_N is None else first_N
        return np.stack(parts, axis=1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "columns": [{"kind": each.kind, **vars(each)} for each in self.columns],
            "mean": list(self.mean_F),
            "scale": list(self.scale_F),
            "with_missing": list(self.with_missing_F),
            **({"raw": True, "required": list(self.required)} if self.raw else {}),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        columns = [dict(each) for each in state["columns"]]
        for each in columns:
            each |= {name: tuple(part) for name, part in each.items() if isinstance(part, list)}
        return cls(
            tuple(COLUMNS[each.pop("kind")](**each) for each in columns),
            tuple(state["mean"]),
            tuple(state["scale"]),
            tuple(state.get("with_missing", ())),
            state.get("raw", False),
            tuple(state.get("required", ())),
        )
