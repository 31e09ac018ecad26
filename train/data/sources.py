"""Sources: where records are kept, and how they are read in parts that fit in memory.

A source is files of one format. What cannot be read from the middle (CSV, JSON lines, folders of
images, huge row groups) is first written as Parquet to a scratch place; from there on there are
only blocks of Parquet.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet

from cluster import storage
from cluster.errors import UserError
from train.tasks import Columns

DIGITS = "sklearn:digits"
FORMATS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv", ".csv.gz", ".tsv.gz"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys((".png", ".jpg", ".jpeg"), "images"),
}
KNOWN = "CSV, Parquet, JSON lines, Arrow, or folders of PNG and JPEG images named by their class"
# Rows read at once, and rows of a scratch file's row group.
BATCH_ROWS, GROUP_ROWS = 1024, 16_384
# Larger row groups of a Parquet file are read once and written as smaller ones.
MAX_GROUP_ROWS = 131_072
IMAGES_AT_ONCE = 256
JSON_PEEK = 1024
CSV_BLOCK_BYTES, GROUP_BYTES = 8 << 20, 64 << 20


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a source, in one row group of a Parquet file.

    origin: the file that a user knows them from; first_row: the first one's number in it.
    start: the first one's number in the source. names: the file of each row, where each has one.
    """

    path: str
    group: int
    num_rows: int
    start: int
    origin: str
    first_row: int
    names: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Where a row of the source is, in a user's words."""
        if self.names:
            return f"'{self.names[row - self.start]}'"
        return f"'{self.origin}', row {self.first_row + row - self.start}"

    def read(
        self, columns: Sequence[str], batch_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        fs, path = storage.filesystem(self.path)
        with fs.open(path, "rb") as stream, reading(self.origin):
            file = pa.parquet.ParquetFile(stream)
            yield from file.iter_batches(
                batch_rows, row_groups=[self.group], columns=list(columns), use_threads=False
            )


@dataclass(frozen=True)
class Source:
    """The files behind a path or URL. Found without reading them."""

    url: str
    format: str
    files: tuple[str, ...]
    size_bytes: int
    fingerprint: str


def find(url: str) -> Source:
    """Return the source at a path, a folder, a glob or any fsspec URL, or sklearn:digits.

    Raises UserError if there is none, or none of a known format.
    """
    if url == DIGITS:
        return Source(url, "digits", (url,), 0, url)
    fs, path = storage.filesystem(url)
    if any(mark in path for mark in "*?["):
        paths = [found for found in fs.glob(path) if fs.isfile(found)]
    elif fs.isdir(path):
        paths = fs.find(path)
    else:
        paths = [path] if fs.exists(path) else []
    below = path.rstrip("/") + "/"
    shown = [each for each in sorted(paths) if not _hidden(each.removeprefix(below))] or paths
    if not shown:
        raise UserError(
            f"'{url}' does not exist or is empty; give a file, folder or glob: {KNOWN}."
        )
    formats = [_format(found) for found in shown]
    known = [each for each in formats if each]
    if not known:
        raise UserError(
            f"'{url}' has no known ending ({PurePosixPath(shown[0]).suffix or 'none'}); "
            f"expected {KNOWN}."
        )
    chosen = max(dict.fromkeys(known), key=known.count)
    kept = [each for each, kind in zip(shown, formats, strict=True) if kind == chosen]
    if chosen == "images" and (len(kept) == 1 and kept[0] == path):
        raise UserError(f"'{url}' is one image; give the folder that has a folder for each class.")
    return Source(
        url,
        chosen,
        tuple(fs.unstrip_protocol(each) if storage.is_url(url) else each for each in kept),
        sum(fs.size(each) or 0 for each in kept),
        json.dumps([str(fs.ukey(each)) for each in kept]),
    )


def open_source(source: Source, scratch: str, encoding: str = "utf-8") -> list[Block]:
    """Return the blocks of a source in order; write it as Parquet into `scratch` if need be.

    Raises UserError that names the file, and the line where it is known, of what cannot be read.
    """
    blocks: list[Block] = []
    if source.format in ("images", "digits"):
        path = storage.join(scratch, "00000.parquet")
        _write(_images(source) if source.format == "images" else iter([_digits()]), path)
        blocks = _blocks(path, source.url, 0)
        if source.format == "images":
            blocks = [
                replace(each, names=source.files[each.start : each.start + each.num_rows])
                for each in blocks
            ]
        return blocks
    for number, file in enumerate(source.files):
        path = file
        with reading(file):
            if source.format != "parquet" or _largest_group(file) > MAX_GROUP_ROWS:
                path = storage.join(scratch, f"{number:05}.parquet")
                _write(_tables(source.format, file, encoding), path)
            blocks += _blocks(path, file, sum(each.num_rows for each in blocks))
    if not blocks:
        raise UserError(f"'{source.url}' holds no records; give a source with at least one row.")
    return blocks


def _largest_group(path: str) -> int:
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as stream:
        metadata = pa.parquet.ParquetFile(stream).metadata
        groups = range(metadata.num_row_groups)
        return max((metadata.row_group(group).num_rows for group in groups), default=0)


def _blocks(path: str, origin: str, start: int) -> list[Block]:
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as stream:
        metadata = pa.parquet.ParquetFile(stream).metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    blocks = []
    first_row = 0
    for group, count in enumerate(counts):
        if count:
            blocks.append(Block(path, group, count, start + first_row, origin, first_row))
        first_row += count
    return blocks


def schema(blocks: Sequence[Block]) -> pa.Schema:
    """Columns of a source. Raises UserError for files whose columns are not the same."""
    schemas: dict[str, tuple[str, pa.Schema]] = {}
    for block in blocks:
        if block.path not in schemas:
            fs, path = storage.filesystem(block.path)
            with fs.open(path, "rb") as stream:
                schemas[block.path] = block.origin, pa.parquet.read_schema(stream)
    (first_file, first), *others = schemas.values()
    for file, other in others:
        if set(other.names) != set(first.names):
            differs = sorted(set(other.names) ^ set(first.names))
            raise UserError(
                f"'{file}' and '{first_file}' have different columns ({', '.join(differs)}); "
                "a source's files must have the same."
            )
    return first


def head(source: Source, count: int, encoding: str = "utf-8") -> Columns:
    """The first records of a source, every column of it, read without the rest where it can be."""
    if source.format == "images":
        source = replace(source, files=source.files[:count])
    if source.format == "parquet":
        fs, path = storage.filesystem(source.files[0])
        with fs.open(path, "rb") as stream, reading(source.files[0]):
            batches = pa.parquet.ParquetFile(stream).iter_batches(count)
            table = pa.Table.from_batches([next(batches)])
    else:
        with reading(source.files[0]):
            if source.format == "digits":
                parts: Iterator[pa.Table] = iter([_digits()])
            elif source.format == "images":
                parts = _images(source)
            else:
                parts = _tables(source.format, source.files[0], encoding)
            first = list(_until(parts, count))
            if not first:
                raise ValueError("it holds no records; expected at least one row")
            table = pa.concat_tables(first).slice(0, count)
    if not table.num_rows:
        raise UserError(f"'{source.url}' holds no records; give a source with at least one row.")
    names = table.schema.names
    check_columns(source.url, names, names)
    return columns(table.combine_chunks().to_batches()[0])


def _until(parts: Iterator[pa.Table], count: int) -> Iterator[pa.Table]:
    rows = 0
    for part in parts:
        yield part
        rows += part.num_rows
        if rows >= count:
            return


def check_columns(url: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for a column that is not there or is there twice."""
    for column in wanted:
        if column not in names:
            alike = [name for name in names if name.lower() == column.lower()]
            hint = f" Did you mean '{alike[0]}'?" if alike else ""
            raise UserError(
                f"'{url}' has no column '{column}'; it has {', '.join(names)}.{hint} "
                "Set target or features to what is there."
            )
        if list(names).count(column) > 1:
            raise UserError(f"'{url}' has the column '{column}' twice; rename one of them.")


def columns(batch: pa.RecordBatch) -> Columns:
    """The values of a batch: numbers and dates as arrays, all else as lists."""
    return {name: _values(column) for name, column in zip(batch.schema.names, batch, strict=True)}


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Turn what goes wrong with a file into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{file}' cannot be read: {error.strerror or error}; give a file, folder or glob: "
            f"{KNOWN}."
        ) from error
    except (pa.ArrowException, UnicodeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"'{file}' cannot be read as {_format(file)}: {problem}") from error


def _values(column: pa.Array) -> Sequence[Any] | np.ndarray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_timestamp(kind):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


def _tables(kind: str, file: str, encoding: str) -> Iterator[pa.Table]:
    """Read a file part by part."""
    fs, path = storage.filesystem(file)
    if kind == "csv":
        with fs.open(path, "rb", compression="infer") as stream:
            names, delimiter = _header(stream.read(CSV_BLOCK_BYTES), encoding)
        with fs.open(path, "rb", compression="infer") as stream:
            try:
                yield from _csv(stream, names, delimiter, encoding)
            except (pa.ArrowInvalid, UnicodeError) as error:
                with fs.open(path, "rb", compression="infer") as again:
                    raise _explained(error, again, names, delimiter, encoding) from error
        return
    with fs.open(path, "rb", compression="infer") as stream:
        if kind == "parquet":
            batches = pa.parquet.ParquetFile(stream).iter_batches(BATCH_ROWS)
            yield from (pa.Table.from_batches([batch]) for batch in batches)
        elif kind == "json":
            if stream.read(JSON_PEEK).lstrip().startswith(b"["):
                raise ValueError(
                    "it is one JSON array; expected an object on each line (jq -c '.[]' makes them)"
                )
            stream.seek(0)
            options = pa.json.ReadOptions(block_size=CSV_BLOCK_BYTES)
            with pa.json.open_json(stream, read_options=options) as reader:
                yield from (pa.Table.from_batches([batch]) for batch in reader)
        else:
            yield from _arrow(stream)


def _csv(
    stream: BinaryIO, names: Sequence[str], delimiter: str, encoding: str
) -> Iterator[pa.Table]:
    """Every column as text, so that no value is guessed at before its kind is known."""
    reader = pa.csv.open_csv(
        stream,
        read_options=pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES, encoding=encoding),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True
        ),
    )
    with reader:
        yield from (pa.Table.from_batches([batch]) for batch in reader)


def _header(start: bytes, encoding: str) -> tuple[list[str], str]:
    """Return the column names and the delimiter: the one that most often divides the header."""
    line = start.decode(encoding, errors="replace").lstrip("\ufeff").splitlines()[:1]
    if not line:
        raise ValueError("it is empty; expected a line with the names of the columns")
    delimiter = max(",;\t|", key=line[0].count)
    names = next(csv.reader(line, delimiter=delimiter))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the column '{twice[0]}' is there twice; rename one of them")
    return names, delimiter


def _explained(
    error: Exception, stream: BinaryIO, names: Sequence[str], delimiter: str, encoding: str
) -> Exception:
    """Name the line of a CSV file that is wrong, or return what is known."""
    if "UTF8" in str(error) or isinstance(error, UnicodeError):
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return ValueError(
                    f"line {number} is not {encoding} text; give its --data.encoding, such as "
                    "latin-1, or convert the file"
                )
    rows = csv.reader(io.TextIOWrapper(stream, encoding, newline=""), delimiter=delimiter)
    for fields in rows:
        if fields and len(fields) != len(names):
            return ValueError(
                f"line {rows.line_num} has {len(fields)} fields; expected {len(names)}, as the "
                "header has. Mend the line, or quote a field that holds the delimiter"
            )
    return error


def _arrow(stream: BinaryIO) -> Iterator[pa.Table]:
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from (pa.Table.from_batches([batch]) for batch in batches)
    else:
        yield from (pa.Table.from_batches([batch]) for batch in pa.ipc.open_stream(stream))


def _images(source: Source) -> Iterator[pa.Table]:
    """Files in folders named by their class as {"image": bytes, "label": str}."""
    fs, _ = storage.filesystem(source.url)
    for start in range(0, len(source.files), IMAGES_AT_ONCE):
        files = source.files[start : start + IMAGES_AT_ONCE]
        contents = [fs.cat_file(storage.filesystem(file)[1]) for file in files]
        labels = [PurePosixPath(file).parent.name for file in files]
        yield pa.table({"image": pa.array(contents, pa.binary()), "label": labels})


def _digits() -> pa.Table:
    """scikit-learn's 1,797 digits as {"image": PNG bytes of 8×8 pixels, "label": 0..9}."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values are 0..16; 255 makes them an ordinary grey image that PNG holds without loss.
    images_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    files = []
    for image_HW in images_NHW:
        buffer = io.BytesIO()
        Image.fromarray(image_HW).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return pa.table({"image": pa.array(files, pa.binary()), "label": digits.target})


def _write(tables: Iterator[pa.Table], path: str) -> None:
    fs, inner = storage.filesystem(path)
    fs.makedirs(inner.rpartition("/")[0], exist_ok=True)
    writer = None
    with fs.open(inner, "wb") as stream:
        try:
            for table in _grouped(tables):
                writer = writer or pa.parquet.ParquetWriter(
                    stream, table.schema, compression="lz4", use_dictionary=False
                )
                writer.write_table(table, row_group_size=GROUP_ROWS)
        finally:
            if writer:
                writer.close()
        if writer is None:
            raise ValueError("it holds no records; expected at least one row")


def _grouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables of a row group's size, where the parts are smaller."""
    parts: list[pa.Table] = []
    for table in tables:
        parts.append(table)
        size = sum(part.nbytes for part in parts)
        if sum(part.num_rows for part in parts) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield pa.concat_tables(parts)
            parts = []
    if parts:
        yield pa.concat_tables(parts)


def _format(path: str) -> str | None:
    name = PurePosixPath(path).name.lower()
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)


def _hidden(path: str) -> bool:
    """Whether a file is one that a program keeps for itself: .name or _name."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).parts if part != "/")
