"""Features that become numbers: numbers, booleans, dates.

Together they are one array, float32 [N, F], in which NaN stands for what is missing: a net learns
from that too. Shapes: N records, F features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, ClassVar, Self

import numpy as np

from train.tasks.records import (
    Arrays,
    Columns,
    InvalidRecord,
    TensorSpec,
    is_missing,
    shorten,
    to_text,
)

DAY_S = 86_400.0
YEAR_S = 365.2425 * DAY_S
# What programs write for a number, date or truth that is not known.
MISSING_WORDS = {"", "na", "n/a", "#n/a", "nan", "null", "none", "nat"}
TRUE, FALSE = {"true", "t", "yes", "y", "1"}, {"false", "f", "no", "n", "0"}


@dataclass(frozen=True)
class Number:
    """A number. Null, NaN, infinity and words such as NA count as missing."""

    column: str
    kind: ClassVar[str] = "number"
    datatype: ClassVar[str] = "FP64"

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float64 [N], NaN where missing. Raises InvalidRecord."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
            numbers_N = values.astype(np.float64)
        else:
            numbers_N = np.array([_number(self.column, *item) for item in enumerate(values)])
        return np.where(np.isfinite(numbers_N), numbers_N, np.nan)


@dataclass(frozen=True)
class Boolean:
    """True or false, also as 1 and 0, yes and no, t and f."""

    column: str
    kind: ClassVar[str] = "boolean"
    datatype: ClassVar[str] = "BOOL"

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float64 [N] of 0, 1 and NaN. Raises InvalidRecord."""
        return np.array([_truth(self.column, *item) for item in enumerate(values)], np.float64)


@dataclass(frozen=True)
class Date:
    """A date or a time: ISO 8601, or in `format` as strptime reads it. Without a zone it is UTC."""

    column: str
    format: str | None = None
    kind: ClassVar[str] = "date"
    datatype: ClassVar[str] = "BYTES"

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return seconds since 1970, float64 [N], NaN where missing. Raises InvalidRecord."""
        if isinstance(values, np.ndarray) and values.dtype.kind == "M":
            micros_N = values.astype("datetime64[us]")
            return np.where(np.isnat(micros_N), np.nan, micros_N.astype(np.int64) / 1e6)
        return np.array([self._seconds(*item) for item in enumerate(values)], np.float64)

    def _seconds(self, row: int, value: Any) -> float:
        if is_missing(value):
            return math.nan
        if isinstance(value, str) and value.strip().lower() in MISSING_WORDS:
            return math.nan
        try:
            moment = self._moment(value)
        except (ValueError, TypeError, OverflowError):
            wanted = f"in the form {self.format}" if self.format else "like 2026-11-22T18:30:00"
            raise InvalidRecord(
                f"field '{self.column}' is {shorten(value)}; expected a date {wanted}. "
                "Send such a text or null.",
                row,
            ) from None
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return zoned.timestamp()

    def _moment(self, value: Any) -> datetime:
        if isinstance(value, datetime):
            return value
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day)
        if isinstance(value, np.datetime64):
            return value.astype("datetime64[us]").item()
        if not isinstance(value, str | bytes):
            raise TypeError("neither a date nor text")
        words = to_text(value).strip()
        return (
            datetime.strptime(words, self.format) if self.format else datetime.fromisoformat(words)
        )


COLUMNS: dict[str, type[Number | Boolean | Date]] = {
    kind.kind: kind for kind in (Number, Boolean, Date)
}


@dataclass(frozen=True)
class Numbers:
    """Numbers, booleans and dates of a record as one array, each scaled by training records.

    A number takes one place; a date seven, and each date after the first one more, the time since
    the first.
    """

    columns: tuple[Number | Boolean | Date, ...]
    mean_F: tuple[float, ...] = ()
    scale_F: tuple[float, ...] = ()

    kind: ClassVar[str] = "numbers"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(each.column, each.datatype, ()) for each in self.columns)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.kind, "FP32", (len(self.names),)),)

    @property
    def names(self) -> tuple[str, ...]:
        """What each place of the array is."""
        return tuple(name for _, name in self._places)

    @property
    def owners(self) -> tuple[str, ...]:
        """The column that each place of the array is of."""
        return tuple(column for column, _ in self._places)

    @property
    def _places(self) -> list[tuple[str, str]]:
        """Column and name of each place."""
        places: list[tuple[str, str]] = []
        first = None
        parts = ("trend", "day_sin", "day_cos", "week_sin", "week_cos", "year_sin", "year_cos")
        for each in self.columns:
            column = each.column
            if not isinstance(each, Date):
                places.append((column, column))
                continue
            places += [(column, f"{column}.{part}") for part in parts]
            if first is not None:
                places.append((column, f"{column} - {first}"))
            first = first or column
        return places

    def fit(self, columns: Columns) -> Self:
        """Take mean and deviation of every place; 0 and 1 where there are none."""
        raw_NF = self._raw(columns)
        known_NF = np.isfinite(raw_NF)
        counts_F = np.maximum(known_NF.sum(axis=0), 1)
        mean_F = np.where(known_NF, raw_NF, 0).sum(axis=0) / counts_F
        squares_F = np.where(known_NF, (raw_NF - mean_F) ** 2, 0).sum(axis=0) / counts_F
        scale_F = np.where(squares_F > 0, np.sqrt(squares_F), 1.0)
        return replace(self, mean_F=tuple(mean_F.tolist()), scale_F=tuple(scale_F.tolist()))

    def encode(self, columns: Columns) -> Arrays:
        """Return {"numbers": float32 [N, F]}. Raises InvalidRecord."""
        assert self.mean_F, "fit first"
        # In float64, so that large numbers keep their differences.
        scaled_NF = (self._raw(columns) - np.array(self.mean_F)) / np.array(self.scale_F)
        return {self.kind: scaled_NF.astype(np.float32)}

    def _raw(self, columns: Columns) -> np.ndarray:
        parts: list[np.ndarray] = []
        first_N = None
        for each in self.columns:
            values_N = each.read(columns[each.column])
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
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        columns = [dict(each) for each in state["columns"]]
        return cls(
            tuple(COLUMNS[each.pop("kind")](**each) for each in columns),
            tuple(state["mean"]),
            tuple(state["scale"]),
        )


def _number(column: str, row: int, value: Any) -> float:
    if is_missing(value):
        return math.nan
    try:
        if isinstance(value, str | bytes):
            value = to_text(value).strip()
            if value.lower() in MISSING_WORDS:
                return math.nan
        elif isinstance(value, date | np.datetime64):
            raise TypeError("a date")
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise InvalidRecord(
            f"field '{column}' is {shorten(value)}; expected a number. Send 37 or null.", row
        ) from None


def _truth(column: str, row: int, value: Any) -> float:
    if is_missing(value):
        return math.nan
    try:
        word = str(value) if isinstance(value, bool | np.bool_) else to_text(value)
    except ValueError as error:
        raise InvalidRecord(f"field '{column}' {error}. Send true, false or null.", row) from None
    word = word.strip().lower()
    if word in MISSING_WORDS:
        return math.nan
    if word not in TRUE | FALSE:
        raise InvalidRecord(
            f"field '{column}' is {shorten(value)}; expected true or false. Send one or null.", row
        )
    return 1.0 if word in TRUE else 0.0
