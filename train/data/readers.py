"""Formats: files as tables, part by part.

Text formats are not guessed at: CSV gives every column as text, JSON lines the types that the whole
file bears out. What a value is, its column's encoder says.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from cluster import storage

DIGITS = "sklearn:digits"
ENDINGS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv", ".csv.gz", ".tsv.gz"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys((".png", ".jpg", ".jpeg"), "images"),
}
KNOWN = "CSV, Parquet, JSON lines, Arrow, or folders of PNG and JPEG images named by their class"
PART_ROWS, PART_IMAGES = 1024, 64
CSV_BLOCK_BYTES = 8 << 20


def file_format(path: str) -> str | None:
    """The format that a file's ending says."""
    name = PurePosixPath(path).name.lower()
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


def read_tables(kind: str, files: Sequence[str], encoding: str) -> Iterator[pa.Table]:
    """Read a file of a format, or all files of a folder of images.

    Raises ValueError, or of pyarrow, for what is wrong with it.
    """
    if kind == "digits":
        yield _digits()
    elif kind == "images":
        yield from _images(files)
    else:
        fs, path = storage.filesystem(files[0])
        if kind == "csv":
            yield from _csv_or_why(fs, path, encoding)
            return
        with fs.open(path, "rb", compression="infer") as stream:
            if kind == "json":
                yield from _json(stream)
            elif kind == "arrow":
                yield from _arrow(stream)
            else:
                file = open_parquet(stream)
                batches = file.iter_batches(PART_ROWS)
                yield from (pa.Table.from_batches([batch]) for batch in batches)


def open_parquet(stream: BinaryIO) -> pa.parquet.ParquetFile:
    """Open Parquet to be read a page at a time, not a whole row group.

    Raises ValueError, see `check_types`.
    """
    file = pa.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    check_types(file.schema_arrow)
    return file


def check_types(schema: pa.Schema) -> None:
    """Raises ValueError for a column of an extension type that is implemented in Python.

    Libraries register such types for the whole process, and Ray Data's for objects unpickles each
    value that is read.
    """
    for field in schema:
        if name := _extension(field.type):
            raise ValueError(
                f"the column '{field.name}' has the extension type '{name}', whose values may run "
                "code when they are read; write it as a plain type, or leave it out"
            )


def _extension(kind: pa.DataType) -> str | None:
    """The name of an extension type that is implemented in Python, in a type or nested in it."""
    if isinstance(kind, pa.ExtensionType):
        return str(kind.extension_name)
    nested = [kind.field(index).type for index in range(kind.num_fields)]
    if isinstance(kind, pa.BaseExtensionType):
        nested.append(kind.storage_type)
    if pa.types.is_dictionary(kind):
        nested.append(kind.value_type)
    return next(filter(None, map(_extension, nested)), None)


def _csv_or_why(fs: Any, path: str, encoding: str) -> Iterator[pa.Table]:
    with fs.open(path, "rb", compression="infer") as stream:
        names, delimiter = _header(stream.read(CSV_BLOCK_BYTES), encoding)
    # Arrow's threads read ahead; with a stream of Python's they would do so when Python is gone.
    local = isinstance(fs, LocalFileSystem)
    try:
        with (
            pa.input_stream(path, compression="detect")
            if local
            else fs.open(path, "rb", compression="infer")
        ) as stream:
            yield from _csv(stream, names, delimiter, encoding)
    except (pa.ArrowInvalid, UnicodeError) as error:
        with fs.open(path, "rb", compression="infer") as stream:
            raise _explained(error, stream, names, delimiter, encoding) from error


def _csv(
    stream: BinaryIO, names: Sequence[str], delimiter: str, encoding: str
) -> Iterator[pa.Table]:
    """Every column as text, null where empty."""
    reader = pa.csv.open_csv(
        stream,
        read_options=pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES, encoding=encoding),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
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
        check_types(file.schema)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from (pa.Table.from_batches([batch]) for batch in batches)
    else:
        batches = pa.ipc.open_stream(stream)
        check_types(batches.schema)
        yield from (pa.Table.from_batches([batch]) for batch in batches)


def _json(stream: BinaryIO) -> Iterator[pa.Table]:
    """JSON lines. They are read twice: no part of them knows the types and fields of the others."""
    kinds: dict[str, set[type]] = {}
    for record in _objects(stream):
        for name, value in record.items():
            kinds.setdefault(name, set()).add(type(value))
    fields = {name: _arrow_type(types - {type(None)}) for name, types in kinds.items()}
    stream.seek(0)
    records = _objects(stream)
    while part := list(islice(records, PART_ROWS)):
        columns = {
            name: pa.array([_as(kind, record.get(name)) for record in part], kind)
            for name, kind in fields.items()
        }
        yield pa.table(columns)


def _objects(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            array = " it may be one array; write an object on each line, as jq -c '.[]' does"
            hint = array if number == 1 and line.lstrip().startswith(b"[") else f" {error}"
            raise ValueError(f"line {number} is not JSON:{hint}") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"line {number} is a JSON {type(record).__name__}; expected an object on each "
                "line, as jq -c '.[]' makes of an array"
            )
        yield record


def _arrow_type(types: set[type]) -> pa.DataType | None:
    """What holds all values of a field; None where lists are to be looked into by Arrow."""
    if types == {bool}:
        return pa.bool_()
    if types == {int}:
        return pa.int64()
    if types and types <= {int, float}:
        return pa.float64()
    return None if types == {list} else pa.string()


def _as(kind: pa.DataType | None, value: Any) -> Any:
    """A value for an array of that type: what is no text, as JSON, where texts are expected."""
    if kind != pa.string() or value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


def _images(files: Sequence[str]) -> Iterator[pa.Table]:
    """Files in folders named by their class as {"image": bytes, "label": str}."""
    for start in range(0, len(files), PART_IMAGES):
        part = files[start : start + PART_IMAGES]
        contents = []
        for file in part:
            fs, path = storage.filesystem(file)
            contents.append(fs.cat_file(path))
        labels = [PurePosixPath(file).parent.name for file in part]
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
