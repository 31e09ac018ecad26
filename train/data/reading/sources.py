"""Sources: locating records and reading them in parts that fit in memory.

A source is a set of files of one format. Formats without random access (CSV, JSON lines, image
folders, Parquet with huge row groups) are first converted to Parquet in a scratch folder, so that
all later code reads row groups of Parquet files.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from cluster import storage
from cluster.errors import UserError
from train.data.reading import readers
from train.data.reading.csv_files import UNKNOWN_CSV, CsvOptions
from train.data.reading.folders import is_hidden, reading_errors
from train.data.reading.readers import DIGITS, KNOWN, file_format
from train.tasks import Columns

# Rows and bytes that are read at once, and of a row group in scratch files.
BATCH_ROWS, BATCH_BYTES = 1024, 16 << 20
GROUP_ROWS, GROUP_BYTES = 16_384, 64 << 20
# Parquet files with larger row groups are rewritten with smaller ones.
MAX_GROUP_ROWS = 131_072
MOST_SHOWN = 3


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a source: one row group of a Parquet file.

    origin: the user's file; first_row: number of the block's first row in it. start: number of the
    first row in the source. names: for images, the file of each row.
    """

    path: str
    group: int
    num_rows: int
    start: int
    origin: str
    first_row: int
    names: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Return the file and row number of a source's row, for messages."""
        if self.names:
            return f"'{self.names[row - self.start]}'"
        return f"'{self.origin}', row {self.first_row + row - self.start}"

    def read(self, columns: Sequence[str], row_bytes: int = 1) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches of at most BATCH_BYTES. row_bytes: size of an encoded row."""
        batch_rows = int(np.clip(BATCH_BYTES // max(row_bytes, 1), 1, BATCH_ROWS))
        fs, path = storage.filesystem(self.path)
        with reading_errors(self.origin), fs.open(path, "rb") as stream:
            yield from readers.open_parquet(stream).iter_batches(
                batch_rows, row_groups=[self.group], columns=list(columns), use_threads=False
            )


@dataclass(frozen=True)
class Source:
    """The files behind a path or URL, found without reading them.

    notes: warnings about files that are skipped or folder names that are ignored.
    """

    url: str
    format: str
    files: tuple[str, ...]
    size_bytes: int
    fingerprint: str
    notes: tuple[str, ...] = ()


def find_source(url: str) -> Source:
    """Return the source at a file, folder, glob or fsspec URL, or sklearn:digits.

    Raises UserError if there are no files of a known format, or files of several formats.
    """
    if url == DIGITS:
        return Source(url, "digits", (url,), 0, url)
    with reading_errors(url):
        fs, path = storage.filesystem(url)
        if fs.isdir(path):
            below = path.rstrip("/") + "/"
            paths = [each for each in fs.find(path) if not is_hidden(each.removeprefix(below))]
        elif storage.exists(url):
            paths = [path]
        else:
            paths = [each for each in fs.glob(path) if fs.isfile(each)]
        files = sorted(paths)
        kinds = {file_format(each) for each in files} - {None}
        if not files or not kinds:
            ending = f" of a known format, only {PurePosixPath(files[0]).name}" if files else ""
            raise UserError(
                f"'{url}' does not exist or holds no file{ending}; give a file, folder or glob: "
                f"{KNOWN}."
            )
        if len(kinds) > 1:
            raise UserError(
                f"'{url}' holds files of several formats ({', '.join(sorted(map(str, kinds)))}); "
                "give a glob of one of them, such as '*.csv'."
            )
        (kind,) = kinds
        kept = [each for each in files if file_format(each) == kind]
        if kind == "images" and kept == [path]:
            raise UserError(f"'{url}' is one image; give a folder with a subfolder for each class.")
        assert kind is not None
        notes = []
        if skipped := [PurePosixPath(each).name for each in files if file_format(each) is None]:
            notes.append(
                f"{len(skipped):,} files of '{url}' have an unknown format and are skipped: "
                + _listed(skipped)
            )
        if fs.isdir(path):
            notes += _notes_on_folders(kept, path, kind)
        return Source(
            url,
            kind,
            tuple(fs.unstrip_protocol(each) if storage.is_url(url) else each for each in kept),
            sum(fs.size(each) or 0 for each in kept),
            json.dumps([str(fs.ukey(each)) for each in kept]),
            tuple(notes),
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _notes_on_folders(files: Sequence[str], root: str, kind: str) -> list[str]:
    """Return notes on subfolders whose names other programs would read as columns or classes."""
    below = root.rstrip("/") + "/"
    parents = [PurePosixPath(file.removeprefix(below)).parent for file in files]
    if kind != "images":
        partitions = sorted({part for each in parents for part in each.parts if "=" in part})
        text = "folder names are not read as columns"
        return [f"{text}: {_listed(partitions)}"] if partitions else []
    notes = []
    outer = sorted(
        {str(each.parent) for each in parents if len(each.parts) > 1} - set(map(str, parents))
    )
    beside = sum(not each.parts for each in parents)
    if outer:
        notes.append(
            "an image's class is its innermost folder; these outer folders are not read as "
            f"classes: {_listed(outer)}"
        )
    if beside and beside < len(parents):
        notes.append(
            f"{beside:,} images are outside the class folders; their class is "
            f"'{PurePosixPath(root).name}'"
        )
    return notes


def open_source(source: Source, scratch: str, options: CsvOptions = UNKNOWN_CSV) -> list[RowBlock]:
    """Return the blocks of a source in order, converted to Parquet in `scratch` if needed.

    Raises UserError that names the unreadable file and, if known, the line.
    """
    blocks: list[RowBlock] = []
    together = source.format in ("images", "digits")
    for number, files in enumerate([source.files] if together else zip(source.files, strict=True)):
        origin = source.url if together else files[0]
        path = files[0]
        with reading_errors(origin):
            if source.format != "parquet" or not _is_readable(path):
                path = storage.join_path(scratch, f"{number:05}.parquet")
                if not _write(readers.read_tables(source.format, files, options), path):
                    continue
            blocks += _blocks(path, origin, sum(each.num_rows for each in blocks))
    if not blocks:
        raise UserError(f"'{source.url}' holds no records; give a source with at least one row.")
    if source.format == "images":
        return [
            replace(each, names=source.files[each.start : each.start + each.num_rows])
            for each in blocks
        ]
    return blocks


def _is_readable(path: str) -> bool:
    """Return whether a Parquet file has plain columns and no row group above MAX_GROUP_ROWS."""
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as stream:
        file = pa.parquet.ParquetFile(stream)
        groups = range(file.metadata.num_row_groups)
        counts = [file.metadata.row_group(group).num_rows for group in groups]
        return max(counts, default=0) <= MAX_GROUP_ROWS and readers.is_plain(file.schema_arrow)


def _blocks(path: str, origin: str, start: int) -> list[RowBlock]:
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as stream:
        metadata = pa.parquet.ParquetFile(stream).metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    blocks = []
    first_row = 0
    for group, count in enumerate(counts):
        if count:
            blocks.append(RowBlock(path, group, count, start + first_row, origin, first_row))
        first_row += count
    return blocks


def source_schema(blocks: Sequence[RowBlock]) -> pa.Schema:
    """Return the columns of a source. Raises UserError if its files have different columns."""
    schemas: dict[str, tuple[str, pa.Schema]] = {}
    for block in blocks:
        if block.path not in schemas:
            fs, path = storage.filesystem(block.path)
            with reading_errors(block.origin), fs.open(path, "rb") as stream:
                schemas[block.path] = block.origin, pa.parquet.read_schema(stream)
    (first_file, first), *others = schemas.values()
    for file, other in others:
        if set(other.names) != set(first.names):
            differs = sorted(set(other.names) ^ set(first.names))
            raise UserError(
                f"'{file}' and '{first_file}' have different columns ({', '.join(differs)}); "
                "all files of a source must have the same columns."
            )
    return first


def check_columns(url: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError if a wanted column is missing or occurs twice in `names`."""
    for column in wanted:
        if column not in names:
            alike = [name for name in names if name.lower() == column.lower()]
            alike = alike or get_close_matches(column, names, 1)
            hint = f" Did you mean '{alike[0]}'?" if alike else ""
            if len(names) == 1 and column in names[0]:
                hint = " Give --data.delimiter: that name looks like several names in one."
            raise UserError(
                f"'{url}' has no column '{column}'; it has {', '.join(map(repr, names))}.{hint} "
                "Set target, features or data.drop to existing columns."
            )
        if list(names).count(column) > 1:
            raise UserError(f"'{url}' has two columns named '{column}'; rename one of them.")


def batch_columns(batch: pa.RecordBatch) -> Columns:
    """Return columns: floats, timestamps and integers without nulls as arrays, others as lists."""
    return {name: _values(column) for name, column in zip(batch.schema.names, batch, strict=True)}


def _values(column: pa.Array) -> Sequence[Any] | np.ndarray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    # to_numpy turns integers with nulls into floats, which lose digits beyond 2^53.
    whole = pa.types.is_integer(kind) and not column.null_count
    if whole or pa.types.is_floating(kind) or pa.types.is_timestamp(kind):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


def _write(tables: Iterator[pa.Table], path: str) -> bool:
    """Write tables of one schema as Parquet. Return whether there was any row."""
    fs, inner = storage.filesystem(path)
    groups = _grouped(tables)
    first = next(groups, None)
    if first is None or not first.num_rows:
        return False
    with storage.storage_errors(path):
        fs.makedirs(inner.rpartition("/")[0], exist_ok=True)
        with (
            fs.open(inner, "wb") as stream,
            pa.parquet.ParquetWriter(
                stream, first.schema, compression="lz4", use_dictionary=False
            ) as writer,
        ):
            writer.write_table(first, row_group_size=GROUP_ROWS)
            for table in groups:
                writer.write_table(table, row_group_size=GROUP_ROWS)
    return True


def _grouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield tables of at least a row group's size, concatenated from smaller ones."""
    parts: list[pa.Table] = []
    for table in tables:
        parts.append(table)
        size = sum(part.nbytes for part in parts)
        if sum(part.num_rows for part in parts) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield pa.concat_tables(parts, promote_options="default")
            parts = []
    if parts:
        yield pa.concat_tables(parts, promote_options="default")
