"""JSON lines as tables, in parts, with fields and types inferred from the whole file."""

import codecs
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from train.values.exact_json import loads_exact
from train.values.records import flatten_record

PART_ROWS = 1024
INT64, UINT64 = range(-(2**63), 2**63), range(2**64)


class _Seen:
    """Types of a field's values, with the range of its integers and the types of list items."""

    def __init__(self) -> None:
        self.types: set[type] = set()
        self.low = self.high = 0
        self.items: _Seen | None = None

    def add(self, value: Any) -> None:
        kind = type(value)
        self.types.add(kind)
        if kind is int:
            self.low, self.high = min(self.low, value), max(self.high, value)
        elif kind is list:
            self.items = self.items or _Seen()
            for item in value:
                self.items.add(item)

    @property
    def arrow_type(self) -> pa.DataType:
        """The Arrow type for all values; string if they have no common type, see `_as`."""
        types = self.types - {type(None)}
        if types == {bool}:
            return pa.bool_()
        if types == {int}:
            if self.low in INT64 and self.high in INT64:
                return pa.int64()
            return pa.uint64() if self.low >= 0 and self.high in UINT64 else pa.string()
        if types and types <= {int, float}:
            return pa.float64()
        if types == {list} and self.items is not None:
            items = self.items.types - {type(None)}
            if not items & {list, dict} and (len(items) < 2 or items == {int, float}):
                return pa.list_(self.items.arrow_type)
        return pa.string()


def read_json(stream: BinaryIO) -> Iterator[pa.Table]:
    """Yield tables of JSON lines, with nested objects as columns `outer.inner`.

    The stream is read twice: first for the fields and types of the whole file, then for values.
    Raises ValueError that names the malformed line.
    """
    fields: dict[str, _Seen] = {}
    for record in _records(stream):
        for name, value in record.items():
            if name not in fields:
                fields[name] = _Seen()
            fields[name].add(value)
    types = {name: seen.arrow_type for name, seen in fields.items()}
    stream.seek(0)
    records = _records(stream)
    while part := list(islice(records, PART_ROWS)):
        yield pa.table(
            {
                name: pa.array([_as(kind, record.get(name)) for record in part], kind)
                for name, kind in types.items()
            }
        )


def _records(stream: BinaryIO) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = _loaded(line)
        except ValueError as error:
            array = " it may be one array; write one object per line, as jq -c '.[]' does"
            hint = array if number == 1 and line.lstrip().startswith(b"[") else f" {error}"
            raise ValueError(f"line {number} is not JSON:{hint}") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"line {number} is a JSON {type(record).__name__}; expected one object per line, "
                "as jq -c '.[]' writes from an array"
            )
        yield flatten_record(record)


def _loaded(line: bytes) -> Any:
    """Parse JSON, reading NaN and Infinity as missing. Raises ValueError.

    NaN and Infinity are not valid JSON, but many programs write them.
    """
    try:
        return loads_exact(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        return json.loads(line, parse_constant=lambda _: None)


def _as(kind: pa.DataType, value: Any) -> Any:
    """Return a value for an Arrow array of type `kind`; for strings, encode others as JSON."""
    if kind != pa.string() or value is None or isinstance(value, str):
        return value
    return str(value) if type(value) is int else orjson.dumps(value).decode()
