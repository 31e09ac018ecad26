"""Sources: read records from where a user keeps them."""

from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from cluster import storage
from cluster.errors import UserError
from train.tasks import Record

DIGITS = "sklearn:digits"


def read(url: str, columns: Sequence[str]) -> list[Record]:
    """Return the records of a Parquet file, a path or any fsspec URL, or of sklearn:digits.

    Raises UserError if the source is missing, is not Parquet, lacks a column or holds no rows.
    """
    records = _digits(columns) if url == DIGITS else _parquet(url, columns)
    if not records:
        raise UserError(f"'{url}' holds no records; give a source with at least one row.")
    return records


def fingerprint(url: str) -> str:
    """A string that changes when the source does, found without reading it."""
    if url == DIGITS:
        return url
    fs, path = storage.filesystem(url)
    try:
        return str(fs.ukey(path))
    except FileNotFoundError:
        raise UserError(
            f"'{url}' does not exist; give the path or URL of a Parquet file."
        ) from None


def _parquet(url: str, columns: Sequence[str]) -> list[Record]:
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            if file.metadata.num_rows == 0:
                return []
            _check_columns(url, columns, file.schema_arrow.names)
            return file.read(columns=list(columns)).to_pylist()
    except OSError as error:
        raise UserError(
            f"'{url}' cannot be read: {error.strerror or error}; "
            "give the path or URL of a Parquet file."
        ) from error
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"'{url}' is not a Parquet file: {error}") from error


def _check_columns(url: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in names]:
        raise UserError(
            f"'{url}' has no column '{missing[0]}'; it has {', '.join(names)}. "
            "Set target or image.column to one of them."
        )


def _digits(columns: Sequence[str]) -> list[Record]:
    """scikit-learn's 1,797 digits as records {"image": uint8 [8, 8], "label": 0..9}."""
    from sklearn.datasets import load_digits

    _check_columns(DIGITS, columns, ["image", "label"])
    digits = load_digits()
    # Values are 0..16; 255 makes them an ordinary grey image that PNG holds without loss.
    images_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return [
        {"image": image_HW, "label": int(label)}
        for image_HW, label in zip(images_NHW, digits.target, strict=True)
    ]
