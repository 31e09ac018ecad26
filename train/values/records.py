"""Types of records, columns and arrays, and helpers to convert and describe them.

Shapes: N records.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from train.values.ragged import FREE, StoredArrays, joined

Record = Mapping[str, Any]
# Records by column: {field: [N] values}, one value for each record.
Columns = Mapping[str, Sequence[Any] | np.ndarray]
Arrays = dict[str, np.ndarray]
Encoded = TypeVar("Encoded")

# Datatypes of the Open Inference Protocol; BYTES has no fixed item size.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BYTES": np.dtype(object),
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


class InvalidRecord(ValueError):
    """A record that cannot be encoded. The message names the field, its value and what to send.

    row: index of the record in the batch, from 0; None if the error concerns all records.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


@contextmanager
def with_row(row: int) -> Iterator[None]:
    """Context manager that sets `row` on InvalidRecord errors raised inside."""
    try:
        yield
    except InvalidRecord as error:
        error.row = row
        raise


def plain_name(name: str) -> str:
    """Return a column's name stripped, on one line, and in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", " ".join(name.split("\n")).replace("\r", "").strip())


def flatten_record(record: Record) -> Record:
    """Return a record with nested objects as fields `outer.inner`; file structs are kept."""
    if not any(isinstance(value, dict) for value in record.values()):
        return record
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict) and not is_file(value):
            for inner, part in flatten_record(value).items():
                flat.setdefault(f"{name}.{inner}", part)
        else:
            flat[name] = value
    return flat


def is_file(value: Any) -> bool:
    """Return whether a value is a file struct, as in datasets: {"bytes": …, "path": …}."""
    return isinstance(value, dict) and isinstance(value.get("bytes", ""), bytes | None)


def encode_valid(
    encode: Callable[[Columns], Encoded], columns: Columns, count: int
) -> tuple[Encoded | None, np.ndarray, list[tuple[int, str]]]:
    """Encode those of `count` records that are valid.

    Returns the result of `encode` for the valid records (None if there are none), their indices,
    int64 [N], and the index and error of each invalid one. Raises InvalidRecord if the error has no
    row because it concerns all records.
    """
    try:
        return encode(columns), np.arange(count), []
    except InvalidRecord as error:
        if error.row is None:
            raise
    bad = dict(_bad(encode, columns, 0, count))
    kept_N = np.array([row for row in range(count) if row not in bad], np.int64)
    if not len(kept_N):
        return None, kept_N, sorted(bad.items())
    kept = {name: _taken(values, kept_N) for name, values in columns.items()}
    return encode(kept), kept_N, sorted(bad.items())


def _bad(
    encode: Callable[[Columns], Any], columns: Columns, first: int, end: int
) -> Iterator[tuple[int, str]]:
    """Yield index and error of each invalid record in first..end-1, found by bisection."""
    try:
        encode({name: values[first:end] for name, values in columns.items()})
    except InvalidRecord as error:
        if end - first == 1:
            yield first, str(error)
            return
        middle = (first + end) // 2
        yield from _bad(encode, columns, first, middle)
        yield from _bad(encode, columns, middle, end)


def _taken(values: Sequence[Any] | np.ndarray, rows_N: np.ndarray) -> Sequence[Any] | np.ndarray:
    return values[rows_N] if isinstance(values, np.ndarray) else [values[row] for row in rows_N]


@dataclass(frozen=True)
class TensorSpec:
    """Name, datatype and shape of a tensor, without the batch dimension.

    datatype: a key of DTYPES. shape: the first dimension may be FREE: records then differ in
    length, and an array of several is padded with 0, see `train.values.ragged`.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.datatype]

    @property
    def ragged(self) -> bool:
        """Whether records differ in length."""
        return FREE in self.shape

    def empty(self) -> np.ndarray:
        """Return the array of no records, [0, …]."""
        shape = tuple(1 if size == FREE else size for size in self.shape)
        return np.empty((0, *shape), self.dtype)


def to_columns(records: Sequence[Record], names: Sequence[str]) -> Columns:
    """Convert records to columns. Raises InvalidRecord if a record lacks one of the fields."""
    for row, record in enumerate(records):
        for name in names:
            if name not in record:
                raise InvalidRecord(
                    f"field '{name}' is missing; expected {', '.join(names)}. "
                    "Send null for an unknown value.",
                    row,
                )
    return {name: [record[name] for record in records] for name in names}


def concatenate(batches: Sequence[Arrays]) -> Arrays:
    """Concatenate batches {name: array [N, …]} along N; a single batch is not copied.

    Arrays [N, L, …] of different lengths L are padded to the longest.
    """
    if len(batches) == 1:
        return batches[0]
    return {name: joined([batch[name] for batch in batches]) for name in batches[0]}


def num_rows(arrays: StoredArrays) -> int:
    """Return N of arrays {name: array [N, …]}."""
    return len(next(iter(arrays.values())))


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: None, NaN, NaT, blank text, no bytes, or an empty file."""
    if is_file(value):
        value = value["bytes"]
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, bytes):
        return len(value) == 0
    if isinstance(value, float | np.floating):
        return value != value
    return isinstance(value, np.datetime64) and bool(np.isnat(value))


def to_text(value: Any) -> str:
    """Return a value as text: bytes decoded as UTF-8, integral floats written as integers.

    Raises ValueError if bytes are not UTF-8.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value)


def shorten(value: Any) -> str:
    """Return the repr of a value for messages, cut to at most 60 characters."""
    words = repr(value.item() if isinstance(value, np.generic) else value)
    return words if len(words) <= 60 else f"{words[:57]}…"
