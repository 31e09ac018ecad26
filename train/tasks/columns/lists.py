"""Columns whose values are lists: vectors of numbers, and sets of labels.

Both become columns of the array of numbers, see `Numbers`. Shapes: N records, K numbers of a vector
or labels of a set.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import orjson

from train.values.label_lists import SEPARATOR, find_separator, split_labels
from train.values.records import InvalidRecord, is_missing, shorten, with_row

# Only this many labels, the most frequent ones, are encoded: each takes a column of the array.
MAX_LABELS = 100


@dataclass(frozen=True)
class Vector:
    """A column of lists of `length` numbers, also as JSON text; `fit` sets the length if None."""

    column: str
    length: int | None = None

    kind: ClassVar[str] = "vector"
    datatype: ClassVar[str] = "FP64"

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.length is None else (self.length,)

    @property
    def places(self) -> list[str]:
        """Names of the K columns of the array."""
        assert self.length is not None, "fit first"
        return [f"{self.column}[{place}]" for place in range(self.length)]

    def fit(self, values: Sequence[Any] | np.ndarray) -> Self:
        """Return the column with the length of the first vector in the values.

        values: [N], as in the records. Raises InvalidRecord if all are missing, or the first one is
        not a list of numbers.
        """
        if self.length is not None:
            return self
        for row, value in enumerate(values):
            if not is_missing(value):
                with with_row(row):
                    return replace(self, length=len(self._numbers(value)))
        raise InvalidRecord(f"field '{self.column}' is missing in every record.")

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float64 [N, K], NaN where a number is missing or infinite.

        Raises InvalidRecord if a value is not a list of K numbers.
        """
        assert self.length is not None, "fit first"
        found_NK = np.full((len(values), self.length), np.nan)
        for row, value in enumerate(values):
            if is_missing(value):
                continue
            with with_row(row):
                numbers_K = self._numbers(value)
                if len(numbers_K) != self.length:
                    raise InvalidRecord(
                        f"field '{self.column}' has {len(numbers_K)} numbers; expected "
                        f"{self.length}. Send a list of that length or null."
                    )
                found_NK[row] = numbers_K
        return np.where(np.isfinite(found_NK), found_NK, np.nan)

    def _numbers(self, value: Any) -> np.ndarray:
        try:
            if isinstance(value, str | bytes):
                value = orjson.loads(value)
            numbers_K = np.asarray([np.nan if item is None else item for item in value], np.float64)
        except (ValueError, TypeError) as error:
            raise self._refused(value) from error
        if numbers_K.ndim != 1:
            raise self._refused(value)
        return numbers_K

    def _refused(self, value: Any) -> InvalidRecord:
        count = "numbers" if self.length is None else f"{self.length} numbers"
        return InvalidRecord(
            f"field '{self.column}' is {shorten(value)}; expected a list of {count}. Send one or "
            "null."
        )


@dataclass(frozen=True)
class LabelSet:
    """A column with any number of labels per value: a list of names, or text with a separator.

    Labels that `fit` did not see are ignored. labels, separator: set by `fit`.
    """

    column: str
    labels: tuple[str, ...] = ()
    separator: str = SEPARATOR

    kind: ClassVar[str] = "set"
    datatype: ClassVar[str] = "BYTES"
    shape: ClassVar[tuple[int, ...]] = ()

    @property
    def places(self) -> list[str]:
        """Names of the K columns of the array."""
        return [f"{self.column}={label}" for label in self.labels]

    def fit(self, values: Sequence[Any] | np.ndarray) -> Self:
        """Return the column with the separator and the most frequent labels of the values.

        values: [N], as in the records. Raises InvalidRecord if there is no label, or a value cannot
        be read.
        """
        fitted = replace(self, separator=find_separator(values) or self.separator)
        counts: Counter[str] = Counter()
        for row, value in enumerate(values):
            counts.update(set(fitted._split(row, value)))
        if not counts:
            raise InvalidRecord(f"field '{self.column}' has no label in any record.")
        ranked = sorted(counts, key=lambda label: (-counts[label], label))
        return replace(fitted, labels=tuple(ranked[:MAX_LABELS]))

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float64 [N, K] of 0 and 1; rows of missing values are NaN.

        Raises InvalidRecord if a value cannot be read.
        """
        places = {label: place for place, label in enumerate(self.labels)}
        found_NK = np.zeros((len(values), len(places)))
        for row, value in enumerate(values):
            if is_missing(value):
                found_NK[row] = np.nan
                continue
            for label in self._split(row, value):
                if label in places:
                    found_NK[row, places[label]] = 1
        return found_NK

    def _split(self, row: int, value: Any) -> list[str]:
        try:
            return split_labels(value, self.separator)
        except ValueError as error:
            raise InvalidRecord(
                f"field '{self.column}' is {shorten(value)}, which {error}; expected labels. "
                f"Send a list of texts, or one text of labels separated by '{self.separator}'.",
                row,
            ) from None
