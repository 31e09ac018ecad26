"""File formats: reading files as tables, in parts.

Values are not interpreted here: CSV columns are text, and JSON lines columns have the type that
fits the whole file. The column's encoder parses the values. Images are files in an `image` column.
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
# Column names of JSON lines need a scan of the file; `column_names` skips larger files.
MAX_SCANNED_JSON = 16 << 20


def file_format(path: str) -> str | None:
    """Return the format by the file's ending, None if it is unknown."""
    name = PurePosixPath(path).name.lower()
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


def read_tables(kind: str, files: Sequence[str], options: CsvOptions) -> Iterator[pa.Table]:
    """Yield the tables of one file, or of all files of an image folder.

    Column names are stripped and normalised, see `plain_name`; nested structs become columns
    `outer.inner`. Raises ValueError or pyarrow.ArrowException if a file is malformed.
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
    """Return a file's column names; None if it has structs or finding names needs a long scan."""
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
    """Open a Parquet file that is read page by page instead of by whole row groups.

    Raises ValueError for an extension type, see `check_types`.
    """
    file = pa.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    check_types(file.schema_arrow)
    return file


def plain_columns(table: pa.Table) -> pa.Table:
    """Return a table with plain column names and types, and with structs flattened to columns.

    An image file's struct, {"bytes", "path"}, is kept. Raises ValueError if two columns then have
    the same name.
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
        raise ValueError(
            f"two columns are called '{twice}', ignoring spaces and Unicode form; rename one of "
            "them"
        )
    return table if names == table.schema.names else table.rename_columns(names)


def is_plain(schema: pa.Schema) -> bool:
    """Return whether `plain_columns` would not change tables of this schema."""
    return all(
        field.name == plain_name(field.name)
        and not _is_nested(field.type)
        and _plain_type(field.type) is None
        for field in schema
    )


def _plain_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type that values of `kind` are converted to, None if it is kept.

    Arrow lacks functions for views and run-end encoding; times and durations are not numbers.
    """
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
    """Return whether a type is a struct other than that of a file, {"bytes", "path"}."""
    if not pa.types.is_struct(kind):
        return False
    place = kind.get_field_index("bytes")
    return place < 0 or not (
        pa.types.is_binary(kind.field(place).type)
        or pa.types.is_large_binary(kind.field(place).type)
    )


def check_types(schema: pa.Schema) -> None:
    """Raise ValueError if a column has an extension type that is implemented in Python.

    Libraries register such types for the whole process. That of Ray Data unpickles each value that
    is read, so a file could run arbitrary code.
    """
    for field in schema:
        if name := _extension(field.type):
            raise ValueError(
                f"the column '{field.name}' has the extension type '{name}', whose values may run "
                "code when they are read; write it as a plain type, or remove it"
            )


def _extension(kind: pa.DataType) -> str | None:
    """Return the name of a Python extension type that `kind` is or contains, None if there is none.

    Built-in extension types, implemented in C++, are accepted.
    """
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
    """Yield image files as {"image": bytes, "label": str}; the label is the folder's name."""
    for start in range(0, len(files), PART_IMAGES):
        part = files[start : start + PART_IMAGES]
        contents = []
        for file in part:
            fs, path = storage.filesystem(file)
            contents.append(fs.cat_file(path))
        labels = [PurePosixPath(file).parent.name for file in part]
        yield pa.table({"image": pa.array(contents, pa.binary()), "label": labels})


def _digits() -> pa.Table:
    """Return scikit-learn's 1,797 digits as {"image": PNG bytes of 8×8 pixels, "label": 0..9}."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Pixels are 0..16; scale them to 0..255 for an ordinary grey PNG, which is lossless.
    images_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    files = []
    for image_HW in images_NHW:
        buffer = io.BytesIO()
        Image.fromarray(image_HW).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return pa.table({"image": pa.array(files, pa.binary()), "label": digits.target})
