"""Samples of a source: its first records, and later ones that differ from these in kind."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cluster.errors import UserError
from train.data.reading import readers, sources
from train.data.reading.csv_files import UNKNOWN_CSV, CsvOptions
from train.data.reading.folders import reading_errors
from train.data.reading.sources import Source
from train.values.number_text import MISSING_WORDS
from train.values.records import Columns, plain_name

# Largest size of the first records, in memory.
HEAD_BYTES = 64 << 20
# If a source is larger, only its first records are read.
MAX_SCANNED_BYTES = 4 << 30
# Most later records that are added for each column.
MOST_SURPRISES = 50
# In addition, one in this many of the later records is added.
SPREAD = 500
# Text that is a number or stands for a missing value.
NUMBER = (
    r"(?i)^\s*([^\pL\d]{0,4}[0-9.,' ]*[0-9][0-9.,]*(e[+-]?[0-9]+)?[^\pL\d]{0,4}|"
    + "|".join(map(re.escape, sorted(MISSING_WORDS)))
    + r")\s*$"
)


def sample_source(source: Source, count: int, options: CsvOptions = UNKNOWN_CSV) -> Columns:
    """Return all columns of the first `count` records of a source, and of informative later ones.

    The first records end early at HEAD_BYTES. Later records are added if a column that held only
    numbers has other text, or a column that was empty or constant has another value; so is one in
    SPREAD of all later records. Raises UserError if the source is empty or cannot be read.
    """
    parts = _parts(source, options)
    first: list[pa.Table] = []
    rows = size = 0
    for part in parts:
        first.append(part)
        rows, size = rows + part.num_rows, size + part.nbytes
        if rows >= count or size >= HEAD_BYTES:
            break
    if not rows:
        raise UserError(f"'{source.url}' holds no records; give a source with at least one row.")
    with reading_errors(source.url):
        head = _together(first)
        sources.check_columns(source.url, head.schema.names, head.schema.names)
        head, rest = head.slice(0, count), head.slice(count)
        found = [head]
        if source.format not in ("images", "digits") and source.size_bytes <= MAX_SCANNED_BYTES:
            found += _surprises(head, rest, parts)
        table = _together(found).combine_chunks()
    return sources.batch_columns(table.to_batches()[0])


def _together(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate tables of several files.

    A column with incompatible types, such as integers and text, becomes text. Raises ValueError if
    a type cannot be converted.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        for name in dict.fromkeys(name for table in tables for name in table.schema.names):
            types = {
                table.schema.field(name).type for table in tables if name in table.schema.names
            }
            if len(types - {pa.null()}) > 1:
                tables = [_as_text(table, name) for table in tables]
        return pa.concat_tables(tables, promote_options="permissive")


def _as_text(table: pa.Table, name: str) -> pa.Table:
    place = table.schema.get_field_index(name)
    if place < 0:
        return table
    column = table.column(place)
    try:
        return table.set_column(place, name, column.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(
            f"the column '{name}' is {column.type} in one file and has another type in others"
        ) from None


def _parts(source: Source, options: CsvOptions) -> Iterator[pa.Table]:
    together = source.format in ("images", "digits")
    for files in [source.files] if together else zip(source.files, strict=True):
        with reading_errors(source.url if together else files[0]):
            yield from readers.read_tables(source.format, files, options)


def _surprises(head: pa.Table, rest: pa.Table, parts: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield records with values of a kind that the head lacks, and one in SPREAD of the rest.

    Files are often sorted, so the head alone is not representative.
    """
    numbers = {name for name in head.schema.names if _all_numbers(_decoded(head[name]))}
    constant = {name: _only_value(_decoded(head[name])) for name in head.schema.names}
    left = dict.fromkeys(head.schema.names, MOST_SURPRISES)
    until_next = SPREAD - 1
    for part in chain([rest], parts):
        yield from _new_in(part, numbers, constant, left)
        yield part.take(np.arange(until_next, part.num_rows, SPREAD))
        until_next = (until_next - part.num_rows) % SPREAD


def _new_in(
    part: pa.Table, numbers: set[str], constant: dict[str, pa.Scalar | None], left: dict[str, int]
) -> Iterator[pa.Table]:
    for name in part.schema.names:
        if left.get(name, 0) <= 0:
            continue
        column = _decoded(part[name])
        if name in numbers and _is_text(column.type):
            new = pa.compute.invert(pa.compute.match_substring_regex(column, NUMBER))
        elif (value := constant.get(name)) is not None:
            new = pa.compute.is_valid(column)
            if value.is_valid and value.type == column.type:
                new = pa.compute.and_(new, pa.compute.not_equal(column, value))
        else:
            continue
        rows = part.filter(new.fill_null(False)).slice(0, left[name])
        if rows.num_rows:
            left[name] -= rows.num_rows
            yield rows


def _all_numbers(column: pa.ChunkedArray) -> bool:
    if not _is_text(column.type) or column.null_count == len(column):
        return False
    return bool(pa.compute.all(pa.compute.match_substring_regex(column, NUMBER)).as_py())


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's values, decoded if it is dictionary-encoded."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _only_value(column: pa.ChunkedArray) -> pa.Scalar | None:
    """Return the only value of a column, null if it has none.

    None if it has several values, or if Arrow cannot compare values of its type.
    """
    if column.null_count == len(column):
        return pa.scalar(None, column.type)
    try:
        values = pa.compute.unique(column.drop_null())
        pa.compute.not_equal(values, values[0])
    except pa.ArrowNotImplementedError:
        return None
    return values[0] if len(values) == 1 else None


def check_names(url: str, wanted: Sequence[str], options: CsvOptions = UNKNOWN_CSV) -> None:
    """Check that a source exists and has the `wanted` columns, without reading all of it.

    Columns are not checked if their names need a long scan. Raises UserError that names the missing
    source or column.
    """
    source = sources.find_source(url)
    with reading_errors(source.files[0]):
        names = readers.column_names(source.format, source.files[0], options)
    if names is not None:
        sources.check_columns(url, wanted, [plain_name(name) for name in names])
