"""Columns whose values become one number each: numbers, booleans, dates. Shapes: N records."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, ClassVar, Self

import numpy as np

from train.values.number_text import (
    MISSING_WORDS,
    NumberFormat,
    find_format,
    most_frequent_format,
)
from train.values.records import InvalidRecord, is_missing, shorten, to_text
from train.values.sentinels import find_sentinels

BOOLEAN_PAIRS = (("true", "false"), ("t", "f"), ("yes", "no"), ("y", "n"), ("1", "0"))
TRUE, FALSE = ({pair[place] for pair in BOOLEAN_PAIRS} for place in (0, 1))
# Date formats that look like one number, which programs may write as a float: 20241231.0.
DIGITS_FORMATS = ("%Y%m%d", "%Y%m%d%H%M%S")
# strptime reads at most 6 digits of a fraction of a second; more are cut off.
FRACTION, MOST_DIGITS = ".%f", 6


@dataclass(frozen=True)
class Number:
    """A column of numbers. Null, NaN, infinity and words such as NA count as missing.

    decimal, unit: how numbers are written as text, see NumberFormat. missing: numbers that mean a
    missing value, such as -999. `fit` detects those that are None.
    """

    column: str
    decimal: str | None = None
    unit: str | None = None
    missing: tuple[float, ...] | None = None

    kind: ClassVar[str] = "number"
    datatype: ClassVar[str] = "FP64"

    @property
    def format(self) -> NumberFormat:
        """The format of numbers that are written as text."""
        return NumberFormat(self.decimal or ".", self.unit or "")

    def fit(self, values: Sequence[Any] | np.ndarray) -> Self:
        """Return the column with `decimal`, `unit` and `missing` detected in the values.

        values: [N], as in the records. Raises InvalidRecord if one is not a number.
        """
        fitted = self
        if self.decimal is None or self.unit is None:
            texts = [value for value in values if isinstance(value, str)]
            found = find_format(texts, self.decimal)[0] or most_frequent_format(texts, self.decimal)
            unit = found.unit if self.unit is None else self.unit
            fitted = replace(self, decimal=found.decimal, unit=unit)
        if self.missing is None:
            numbers_N = replace(fitted, missing=()).read(values)
            fitted = replace(fitted, missing=find_sentinels(numbers_N[~np.isnan(numbers_N)]))
        return fitted

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float64 [N], NaN where missing. Raises InvalidRecord if one is not a number."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
            numbers_N = values.astype(np.float64)
        else:
            numbers_N = self._parsed(values)
        known_N = np.isfinite(numbers_N)
        if self.missing:
            known_N &= ~np.isin(numbers_N, self.missing)
        return np.where(known_N, numbers_N, np.nan)

    def _parsed(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        if set(map(type, values)) <= {str, type(None)}:
            texts = [value or "nan" for value in values]
            if (numbers := self.format.parse_all(texts)) is not None:
                return np.array(numbers, np.float64)
        return np.array([self._number(*item) for item in enumerate(values)], np.float64)

    def _number(self, row: int, value: Any) -> float:
        if is_missing(value):
            return math.nan
        try:
            if isinstance(value, str | bytes):
                text = to_text(value)
                if text.strip().lower() in MISSING_WORDS:
                    return math.nan
                return self.format.parse(text)
            if isinstance(value, date | np.datetime64):
                raise TypeError("a date")
            return float(value)
        except OverflowError:  # an integer too large for a float
            return math.nan
        except (ValueError, TypeError):
            wanted, example = "a number", "37"
            if self.decimal == ",":
                wanted, example = "a number with a decimal comma", "37,5"
            if self.unit:
                wanted += f", with or without the unit {self.unit}"
            raise InvalidRecord(
                f"field '{self.column}' is {shorten(value)}; expected {wanted}. "
                f"Send {example} or null.",
                row,
            ) from None


@dataclass(frozen=True)
class Boolean:
    """A column of booleans, also written as 1 and 0, yes and no, or t and f."""

    column: str
    kind: ClassVar[str] = "boolean"
    datatype: ClassVar[str] = "BOOL"

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float64 [N] of 0 and 1, NaN where missing.

        Raises InvalidRecord if a value is not a boolean.
        """
        return _read_each(values, lambda row, value: _truth(self.column, row, value))


@dataclass(frozen=True)
class Date:
    """A column of dates or times in ISO 8601 or a strptime `format`. The default zone is UTC."""

    column: str
    format: str | None = None
    kind: ClassVar[str] = "date"
    datatype: ClassVar[str] = "BYTES"

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return seconds since 1970, float64 [N], NaN where missing.

        Raises InvalidRecord if a value is not a date.
        """
        if isinstance(values, np.ndarray) and values.dtype.kind == "M":
            micros_N = values.astype("datetime64[us]")
            return np.where(np.isnat(micros_N), np.nan, micros_N.astype(np.int64) / 1e6)
        return _read_each(values, self._seconds)

    def _seconds(self, row: int, value: Any) -> float:
        if is_missing(value):
            return math.nan
        if isinstance(value, str) and value.strip().lower() in MISSING_WORDS:
            return math.nan
        try:
            moment = self._moment(value)
        except (ValueError, TypeError, OverflowError):
            wanted = f"in the format {self.format}" if self.format else "like 2026-11-22T18:30:00"
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
        if self.format in DIGITS_FORMATS and isinstance(value, int | float | np.number):
            value = to_text(value)
        if not isinstance(value, str | bytes):
            raise TypeError("neither a date nor text")
        words = to_text(value).strip()
        if self.format is None:
            return datetime.fromisoformat(words)
        if self.format.endswith(FRACTION):
            seconds, _, fraction = words.partition(".")
            words = f"{seconds}.{fraction[:MOST_DIGITS] or '0'}"
        elif self.format in DIGITS_FORMATS:
            words = words.removesuffix(".0")
        return datetime.strptime(words, self.format)


def _read_each(values: Sequence[Any] | np.ndarray, read: Callable[[int, Any], float]) -> np.ndarray:
    """Return `read(row, value)` of each value, float64 [N]; equal strings are read only once."""
    known: dict[str, float] = {}
    found_N = np.empty(len(values))
    for row, value in enumerate(values):
        if type(value) is not str:
            found_N[row] = read(row, value)
            continue
        if value not in known:
            known[value] = read(row, value)
        found_N[row] = known[value]
    return found_N


def _truth(column: str, row: int, value: Any) -> float:
    if value is True or value is False:
        return float(value)
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
