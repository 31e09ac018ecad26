"""Rows of the request log, with a record and its prediction each, as Arrow columns.

A field has one type, however clients send it: numbers are float64, booleans are bool, texts are
strings, and images are the bytes of an image file. Shapes: N records, K classes.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from serve.requestlog.values import field_values
from train.tasks import Arrays, Columns, TensorSpec
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.scalars import Number
from train.values.label_lists import SEPARATOR, split_labels
from train.values.records import is_missing, to_text

# Maximum rows that are logged of one request.
MAX_ROWS = 64
TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A request that was answered.

    time_s: when it arrived, seconds since 1970. columns: the values of each field, one per record.
    predictions: "label" [N] and "probabilities" [N, K], or "value" [N]. fields: the fields of the
    model's features. readers: parsers of the fields that are numbers, vectors or sets.
    """

    request_id: str
    version: str
    variant: str
    time_s: float
    latency_s: float
    columns: Columns
    predictions: Arrays
    fields: Sequence[TensorSpec]
    readers: Mapping[str, Number | Vector | LabelSet] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BufferedEntry:
    """An entry that waits to be written: its logged rows, without the excluded fields."""

    entry: LogEntry
    rows: Sequence[int]
    columns: Columns
    predictions: Arrays
    size_bytes: int


def buffer_entry(entry: LogEntry, drop: frozenset[str]) -> BufferedEntry:
    """Return the part of an entry that is written; it holds no reference to the request's body.

    drop: names of the excluded fields.
    """
    count = len(next(iter(entry.predictions.values())))
    # Evenly spaced rows of a large request, because neighbouring rows are often similar.
    rows = range(count) if count <= MAX_ROWS else (np.arange(MAX_ROWS) * count // MAX_ROWS).tolist()
    columns = {
        name: _taken(values, rows, count)
        for name, values in entry.columns.items()
        if name not in drop
    }
    predictions = {
        name: np.asarray(_taken(values, rows, count)) for name, values in entry.predictions.items()
    }
    size = sum(map(_size_bytes, columns.values())) + sum(map(_size_bytes, predictions.values()))
    return BufferedEntry(entry, rows, columns, predictions, size + 200)


def _taken(values: Any, rows: Sequence[int], count: int) -> Any:
    if isinstance(values, np.ndarray):
        if len(rows) < count:
            return values[rows]
        return values if values.base is None else values.copy()
    return values if len(rows) == count else [values[row] for row in rows]


def _size_bytes(values: Any) -> int:
    """Return roughly how much memory the values use."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values.nbytes
    size = 64 * len(values)
    for value in values:
        if isinstance(value, bytes | str):
            size += len(value)
        elif isinstance(value, np.ndarray):
            size += value.nbytes
    return size


def to_table(kept: Sequence[BufferedEntry], hashed: frozenset[str]) -> pa.Table:
    """Return a table with one line per logged row.

    hashed: fields of which only a keyed digest is written. Fields that some entries lack, because
    their version has other fields, are null there.
    """
    alike: dict[Any, list[BufferedEntry]] = defaultdict(list)
    for each in kept:
        fields = tuple(field for field in each.entry.fields if field.name in each.columns)
        alike[fields, "label" in each.predictions].append(each)
    return concat_tables([_table(fields, group, hashed) for (fields, _), group in alike.items()])


def _table(
    fields: Sequence[TensorSpec], group: Sequence[BufferedEntry], hashed: frozenset[str]
) -> pa.Table:
    def of_entry(values: Iterable[Any]) -> list[Any]:
        """Repeat the value of each entry for each of its rows."""
        return [value for value, each in zip(values, group, strict=True) for _ in each.rows]

    entries = [each.entry for each in group]
    prediction, confidence = _predictions(group)
    columns = {
        "id": pa.array(of_entry(entry.request_id for entry in entries), pa.string()),
        "row": pa.array([row for each in group for row in each.rows], pa.int32()),
        "time": pa.array(of_entry(int(entry.time_s * 1e6) for entry in entries), TIME),
        "version": pa.array(of_entry(entry.version for entry in entries), pa.string()),
        "variant": pa.array(of_entry(entry.variant for entry in entries), pa.string()),
        "latency_ms": pa.array(of_entry(entry.latency_s * 1e3 for entry in entries), pa.float64()),
        "prediction": prediction,
        "confidence": confidence,
    }
    if fields:  # Parquet does not support a struct without fields
        parts = [
            field_values(
                spec,
                [value for each in group for value in _plain(each, spec.name)],
                hashed=spec.name in hashed,
            )
            for spec in fields
        ]
        columns["record"] = pa.StructArray.from_arrays(parts, [spec.name for spec in fields])
    return pa.table(columns)


def _plain(kept: BufferedEntry, name: str) -> Iterable[Any]:
    """Return the values of a field; numbers as numbers and sets as joined labels."""
    reader, values = kept.entry.readers.get(name), kept.columns[name]
    if isinstance(reader, LabelSet):
        return (
            None if is_missing(value) else SEPARATOR.join(split_labels(value, reader.separator))
            for value in values
        )
    if reader is None:
        return values
    read_N = (
        replace(reader, missing=()).read(values)
        if isinstance(reader, Number)
        else (reader.read(values))
    )
    return [None if np.isnan(value).all() else value for value in read_N]


def _predictions(group: Sequence[BufferedEntry]) -> tuple[pa.Array, pa.Array]:
    """Return the predictions and confidences of all rows; numbers have null confidences.

    The confidence is the largest probability of a row.
    """
    if "label" not in group[0].predictions:
        values_N = np.concatenate([each.predictions["value"] for each in group])
        return pa.array(values_N, pa.float64()), pa.nulls(len(values_N), pa.float32())
    labels = [to_text(label) for each in group for label in each.predictions["label"]]
    largest_N = np.concatenate([each.predictions["probabilities"].max(axis=1) for each in group])
    return pa.array(labels, pa.string()), pa.array(largest_N, pa.float32())


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Return one table with the rows of all.

    Columns that some tables lack are null there; a column that has different types becomes text.
    """
    if all(each.schema == tables[0].schema for each in tables):
        return pa.concat_tables(tables)
    schema = _schema([each.schema for each in tables])
    return pa.concat_tables([_cast(each, schema) for each in tables])


def _schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    found: dict[str, list[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            found.setdefault(field.name, []).append(field.type)
    return pa.schema([(name, _common(types)) for name, types in found.items()])


def _common(types: Sequence[pa.DataType]) -> pa.DataType:
    known = [each for each in types if not pa.types.is_null(each)] or list(types)
    if all(pa.types.is_struct(each) for each in known):
        return pa.struct(_schema([pa.schema(list(each)) for each in known]))
    if all(each == known[0] for each in known):
        return known[0]
    return pa.binary() if any(pa.types.is_binary(each) for each in known) else pa.string()


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    arrays = [
        _cast_array(table[field.name].combine_chunks(), field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _cast_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if isinstance(array, pa.ChunkedArray):  # without chunks, which combine_chunks leaves as it is
        return pa.nulls(0, kind)
    if pa.types.is_struct(kind):
        given = {field.name for field in array.type}
        parts = [
            _cast_array(array.field(field.name), field.type)
            if field.name in given
            else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(parts, fields=list(kind))
    if pa.types.is_binary(kind):
        return array.cast(pa.string()).cast(kind)
    return array.cast(kind)
