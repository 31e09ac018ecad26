"""Tensors of the Open Inference Protocol v2: JSON values or raw bytes ↔ numpy arrays.

Nothing is allocated by a shape before the data has been seen to be as long as the shape says.
"""

import base64
import binascii
import math
import struct
from itertools import chain
from typing import Any

import numpy as np

from serve.errors import BadRequest
from train.values.records import DATATYPES, DTYPES

MAX_RANK = 8
MAX_SIZE = 2**31


def decode(tensor: Any, raw: memoryview | None) -> tuple[str, np.ndarray]:
    """Return name and array of an input tensor; BYTES become an object array of bytes.

    raw: the tensor's binary data, or None when its JSON holds "data".
    Raises BadRequest that names the tensor.
    """
    name, datatype, shape = tensor_header(tensor)
    where, count = f"input '{name}'", math.prod(shape)
    if raw is not None:
        if "data" in tensor:
            raise BadRequest(f"{where} has both data and binary data; expected one.")
        values = _from_raw(raw, datatype, count, where)
    else:
        data = _field(tensor, "data", list, where)
        base64_encoded = (tensor.get("parameters") or {}).get("content_type") == "base64"
        values = _from_json(data, datatype, shape, where, base64_encoded=base64_encoded)
        if None in data and count != shape[0]:
            raise BadRequest(f"{where}: null may stand for a row's one value only.")
    return name, values.reshape(shape)


def tensor_header(tensor: Any) -> tuple[str, str, list[int]]:
    """Return name, datatype and shape of an input tensor. Raises BadRequest that names it."""
    name = _field(tensor, "name", str, "input")
    where = f"input '{name}'"
    datatype = _field(tensor, "datatype", str, where)
    if datatype not in DTYPES:
        raise BadRequest(
            f"{where}: datatype '{datatype[:40]}' is unknown; expected one of {', '.join(DTYPES)}."
        )
    shape = _field(tensor, "shape", list, where)
    if not 1 <= len(shape) <= MAX_RANK or not all(
        type(size) is int and 0 < size < MAX_SIZE for size in shape
    ):
        raise BadRequest(
            f"{where}: shape must be 1 to {MAX_RANK} whole numbers from 1; the first is the batch."
        )
    return name, datatype, shape


def encode_json(name: str, array: np.ndarray) -> dict[str, Any]:
    """Return an output tensor with its data inside; strings for BYTES."""
    data = array.ravel().tolist() if array.dtype == object else np.ascontiguousarray(array.ravel())
    return {**output_header(name, array), "data": data}


def encode_raw(name: str, array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Return an output tensor without data, and its data as bytes."""
    if array.dtype == object:
        parts = [
            value if isinstance(value, bytes) else str(value).encode() for value in array.ravel()
        ]
        raw = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    else:
        raw = np.ascontiguousarray(array).tobytes()
    return {**output_header(name, array), "parameters": {"binary_data_size": len(raw)}}, raw


def output_header(name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[array.dtype], "shape": list(array.shape)}


def _field(tensor: Any, key: str, kind: type, where: str) -> Any:
    value = tensor.get(key) if isinstance(tensor, dict) else None
    if not isinstance(value, kind):
        words = "a list" if kind is list else "a string"
        raise BadRequest(f"{where}: '{key}' is missing or is not {words}.")
    return value


def _from_raw(raw: memoryview, datatype: str, count: int, where: str) -> np.ndarray:
    if datatype == "BYTES":
        return _strings_from_raw(raw, count, where)
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(
            f"{where}: {len(raw)} bytes of binary data; its shape and {datatype} make "
            f"{count * dtype.itemsize}."
        )
    return np.frombuffer(raw, dtype.newbyteorder("<"))


def _strings_from_raw(raw: memoryview, count: int, where: str) -> np.ndarray:
    values: list[bytes] = []
    position = 0
    while position < len(raw) and len(values) < count:
        if position + 4 > len(raw):
            break
        (length,) = struct.unpack_from("<I", raw, position)
        if position + 4 + length > len(raw):
            break
        values.append(bytes(raw[position + 4 : position + 4 + length]))
        position += 4 + length
    if position != len(raw) or len(values) != count:
        raise BadRequest(
            f"{where}: its binary data is not {count} elements of a 4-byte length and its bytes."
        )
    return object_array(values)


def _from_json(
    data: list[Any], datatype: str, shape: list[int], where: str, *, base64_encoded: bool
) -> np.ndarray:
    if datatype == "FP16":
        raise BadRequest(f"{where}: FP16 has no JSON form; send it as binary data.")
    nested, values = flatten(data, where)
    count = math.prod(shape)
    if len(values) != count:
        raise BadRequest(f"{where}: {len(values)} values in data; its shape makes {count}.")
    if len(nested) > 1 and _without_ones(nested) != _without_ones(shape):
        raise BadRequest(f"{where}: data is nested as {nested}; its shape is {shape}.")
    if datatype == "BYTES":
        return _strings_from_json(values, where, base64_encoded=base64_encoded)
    accepted: set[type] = {bool} if datatype == "BOOL" else {int}
    if datatype[0] == "F":
        accepted = {int, float}
    unknown = None in values
    if not set(map(type, values)) <= accepted | {type(None)}:
        raise BadRequest(f"{where}: data must be values of {datatype}, or null.")
    try:
        # Of floating-point numbers null becomes NaN; nothing else can hold it.
        holds_all = not unknown or datatype[0] == "F"
        with np.errstate(over="raise"):
            return np.array(values, DTYPES[datatype]) if holds_all else object_array(values)
    except (OverflowError, FloatingPointError):
        known = [value for value in values if value is not None]
        raise BadRequest(
            f"{where}: data reaches from {str(min(known))[:40]} to {str(max(known))[:40]}, "
            f"more than {datatype} holds."
        ) from None


def _without_ones(shape: list[int]) -> list[int]:
    return [size for size in shape if size != 1]


def flatten(data: list[Any], where: str) -> tuple[list[int], list[Any]]:
    """Return shape and leaves of nested lists.

    Nothing is put into an array before its type is known: numpy would make room for the longest
    string in every place. Raises BadRequest if the lists are uneven or nested too deeply.
    """
    shape = [len(data)]
    while data and any(isinstance(value, list) for value in data):
        if not all(isinstance(value, list) for value in data) or len(set(map(len, data))) != 1:
            raise BadRequest(f"{where}: the lists of data are uneven.")
        if len(shape) == MAX_RANK:
            raise BadRequest(f"{where}: data is nested more than {MAX_RANK} deep.")
        shape.append(len(data[0]))
        data = list(chain.from_iterable(data))
    return shape, data


def _strings_from_json(values: list[Any], where: str, *, base64_encoded: bool) -> np.ndarray:
    if not all(isinstance(value, str | None) for value in values):
        raise BadRequest(f"{where}: data of BYTES must be strings, or null.")
    return object_array(
        [
            None
            if value is None
            else from_base64(value, where)
            if base64_encoded
            else value.encode(errors="surrogatepass")
            for value in values
        ]
    )


def from_base64(value: str, where: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: not valid base64 ({error}).") from error


def object_array(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array
