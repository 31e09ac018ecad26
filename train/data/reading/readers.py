"""Formats: files as tables, part by part.

Text formats are not guessed at: CSV gives every column as text, JSON lines the types that the whole
file bears out. What a value is, its column's encoder says.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from cluster import storage
from train.data.reading.csv_files import CsvOptions, read_column_names, read_csv
from train.data.reading.json_lines import PART_ROWS, read_json
from train.values.pictures import KNOWN_PICTURES, PICTURE_ENDINGS
from train.values.records import plain_name

DIGITS = "sklearn:digits"
ENDINGS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv", ".csv.gz", ".tsv.gz"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys(PICTURE_ENDINGS, "images"),
}
KNOWN = (
    f"CSV, Parquet, JSON lines, Arrow, or folders of {KNOWN_PICTURES} images named by their class"
)
PART_IMAGES = 64
# The columns of larger files of JSON lines are known once these are read.
MAX_SCANNED_JSON = 16 << 20


def file_format(path: str) -> str | None:
    """The format that a file's ending says."""
    name = PurePosixPath(path).name.lower()
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


def read_tables(kind: str, files: Sequence[str], options: CsvOptions) -> Iterator[pa.Table]:
    """Read a file of a format, or all files of a folder of images.

    Names of columns lose spaces at their ends; what is nested becomes columns `outer.inner`.
    Raises ValueError, or of pyarrow, for what is wrong with it.
    """
    for table in _read(kind, files, options):
        yield plain_columns(table)


def _read(kind: str, files: Sequence[str], options: CsvOptions) -> Iterator[pa.Table]:
    if kind == "digits":
        yield _digits()
    elif kind == "images":
        yield from _images(files)
    else:
        fs, path = storage.filesystem(files[0])
        if kind == "csv":
            yield from read_csv(fs, path, options)
            return
        with fs.open(path, "rb", compression="infer") as stream:
            if kind == "json":
                yield from read_json(stream)
            elif kind == "arrow":
                yield from _arrow(stream)
            else:
                file = open_parquet(stream)
                batches = file.iter_batches(PART_ROWS)
                yield from (pa.Table.from_batches([batch]) for batch in batches)


def column_names(kind: str, file: str, options: CsvOptions) -> list[str] | None:
    """Return the columns of a file, None where that takes long or some of Parquet are nested."""
    fs, path = storage.filesystem(file)
    if kind == "csv":
        return read_column_names(fs, path, options).names
    if kind in ("images", "digits"):
        return ["image", "label"]
    if kind == "json" and (fs.size(path) or 0) <= MAX_SCANNED_JSON:
        with fs.open(path, "rb", compression="infer") as stream:
            return next((table.schema.names for table in read_json(stream)), None)
    if kind != "parquet":
        return None
    with fs.open(path, "rb") as stream:
        schema = pa.parquet.read_schema(stream)
    return None if any(_is_nested(field.type) for field in schema) else schema.names


def open_parquet(stream: BinaryIO) -> pa.parquet.ParquetFile:
    """Open Parquet to be read a page at a time, not a whole row group.

    Raises ValueError, see `check_types`.
    """
    file = pa.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    check_types(file.schema_arrow)
    return file


def plain_columns(table: pa.Table) -> pa.Table:
    """Return a table with plain names of columns, and what is nested as columns of their own.

    A struct of an image file, {"bytes", "path"}, stays one. Raises ValueError if names are alike.
    """
    while nested := [field.name for field in table.schema if _is_nested(field.type)]:
        names: list[str] = []
        columns: list[pa.ChunkedArray] = []
        for name, column in zip(table.schema.names, table.columns, strict=True):
            part = pa.table({name: column})
            part = part.flatten() if name in nested else part
            names += part.schema.names
            columns += part.columns
        table = pa.table(columns, names=names)
    for place, field in enumerate(table.schema):
        if (plain := _plain_type(field.type)) is not None:
            column = table.column(place)
            if pa.types.is_run_end_encoded(field.type):
                column = pa.compute.run_end_decode(column)
            if field.type == pa.time64("ns"):
                column = column.cast(pa.time64("us"), safe=False)
            table = table.set_column(place, field.name, column.cast(plain))
    names = [plain_name(name) for name in table.schema.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two columns are called '{twice}', but for spaces; rename one of them")
    return table if names == table.schema.names else table.rename_columns(names)


def is_plain(schema: pa.Schema) -> bool:
    """Whether `plain_columns` leaves tables of a schema as they are."""
    return all(
        field.name == plain_name(field.name)
        and not _is_nested(field.type)
        and _plain_type(field.type) is None
        for field in schema
    )


def _plain_type(kind: pa.DataType) -> pa.DataType | None:
    """What a type is read as that Arrow has no functions for, or whose values are no numbers."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type) or kind.value_type
    if pa.types.is_time(kind):
        return pa.string()
    return pa.int64() if pa.types.is_duration(kind) else None


def _is_nested(kind: pa.DataType) -> bool:
    """Whether a type is a struct other than a file's, {"bytes", "path"}."""
    if not pa.types.is_struct(kind):
        return False
    place = kind.get_field_index("bytes")
    return place < 0 or not (
        pa.types.is_binary(kind.field(place).type)
        or pa.types.is_large_binary(kind.field(place).type)
    )


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
