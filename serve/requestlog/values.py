"""Values of a logged field as Arrow arrays, plain or as keyed digests.

Shapes: N records.
"""

import hashlib
import hmac
import io
import os
import secrets
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from train.tasks import TensorSpec
from train.tasks.columns.image import MODES
from train.tasks.columns.scalars import Boolean, Number
from train.values.pictures import has_signature, picture_content
from train.values.records import is_missing, to_text

KEY_VARIABLE = "HALYARD_LOG_KEY"


def field_values(spec: TensorSpec, values: list[Any], *, hashed: bool) -> pa.Array:
    """Return one field's values of all records. hashed: whether as digests.

    Raises ValueError for an image that is neither pixels nor a file.
    """
    if not spec.shape and spec.datatype != "BYTES":
        values = _known(spec, values)
    if hashed:
        return pa.array([_digest(spec, value) for value in values], pa.string())
    if _is_image(spec):
        return pa.array([_file(value) for value in values], pa.binary())
    if spec.datatype == "BYTES":
        return _texts(values)
    if spec.shape:
        return pa.array([np.asarray(value).tolist() for value in values])
    return pa.array(values, pa.bool_() if spec.datatype == "BOOL" else pa.float64())


def _known(spec: TensorSpec, values: list[Any]) -> list[bool | float | None]:
    """Return numbers or booleans, parsed if they were sent as text; None for missing values."""
    if spec.datatype == "BOOL":
        truths_N = Boolean(spec.name).read(values)
        return [None if np.isnan(truth) else truth == 1 for truth in truths_N.tolist()]
    numbers_N = Number(spec.name).read(values)
    return [None if np.isnan(number) else number for number in numbers_N.tolist()]


def _is_image(spec: TensorSpec) -> bool:
    return spec.datatype == "UINT8" and len(spec.shape) == 3 and spec.shape[2] in MODES


def _texts(values: list[Any]) -> pa.Array:
    """Return strings, or bytes if a custom encoder uses values that are not text."""
    try:
        return pa.array(
            [None if is_missing(each) else to_text(each) for each in values], pa.string()
        )
    except ValueError:
        return pa.array([None if is_missing(each) else _bytes(each) for each in values])


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else to_text(value).encode()


def _file(value: Any) -> bytes | None:
    """Return an image as a file: the file that was sent, or a PNG of the pixels.

    Raises ValueError if the value is neither.
    """
    if is_missing(value):
        return None
    if not isinstance(value, np.ndarray):
        content = picture_content(value)
        if content is not None and has_signature(content):
            return content
        raise ValueError("an image is neither pixels nor a file")
    pixels = value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value
    stream = io.BytesIO()
    # Uncompressed, because Parquet compresses the file; both would take twice as long for the same
    # size.
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def _digest(spec: TensorSpec, value: Any) -> str | None:
    """Return the HMAC-SHA256 of a value in hexadecimal; equal values have equal digests."""
    if is_missing(value):
        return None
    if isinstance(value, np.ndarray):
        content = f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, bytes):
        content = value
    else:
        content = to_text(value).encode(errors="surrogatepass")
    return hmac.new(_key(), spec.name.encode() + b"\0" + content, hashlib.sha256).hexdigest()


@cache
def _key() -> bytes:
    """Return the key from the environment, or a random key of this process."""
    return os.environ.get(KEY_VARIABLE, "").encode() or secrets.token_bytes(32)
