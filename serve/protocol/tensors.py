"""Conversion of Open Inference Protocol v2 tensors between JSON or raw bytes and numpy arrays.

The length of the data is compared with the shape before an array is allocated, so that a small
request with a huge shape cannot exhaust memory. N is the number of rows, the first dimension.
"""

import base64
import binascii
import math
import struct
from itertools import chain
from typing import Any

import numpy as np

from serve.errors import BadRequest, abbreviated
from train.values.records import DATATYPES, DTYPES

# Parameter of an input with the lengths of its rows, where they differ.
LENGTHS = "lengths"

MAX_RANK = 8
MAX_SIZE = 2**31


def decode(tensor: Any, raw: memoryview | None) -> tuple[str, np.ndarray]:
    """Return the name of an input tensor and its values as an array [N, …] of the given shape.

    raw: the tensor's binary data, or None if its JSON has "data". The dtype is that of the
    datatype. BYTES give an array of dtype object that holds bytes, and nulls in place of integers
    or booleans give one that holds None. Raises BadRequest if the tensor is malformed.
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
            raise BadRequest(f"{where}: data has null; this requires one value per row.")
    return name, values.reshape(shape)


def tensor_header(tensor: Any) -> tuple[str, str, list[int]]:
    """Return the name, datatype and shape of an input tensor. Raises BadRequest if one is wrong."""
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
            f"{where}: shape must be 1 to {MAX_RANK} integers from 1 to {MAX_SIZE - 1}, the batch "
            "size first."
        )
    return name, datatype, shape


def encode_json(name: str, array: np.ndarray) -> dict[str, Any]:
    """Return an output tensor with its data.

    array: [N, …]; one of dtype object holds strings, which become BYTES.
    """
    data = array.ravel().tolist() if array.dtype == object else np.ascontiguousarray(array.ravel())
    return {**output_header(name, array), "data": data}


def encode_raw(name: str, array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Return an output tensor without data, and its data as bytes.

    array: [N, …]; one of dtype object holds strings, each of which is encoded as UTF-8 with its
    length in 4 bytes before it.
    """
    if array.dtype == object:
        parts = [
            value if isinstance(value, bytes) else str(value).encode() for value in array.ravel()
        ]
        raw = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    else:
        raw = np.ascontiguousarray(array).tobytes()
    return {**output_header(name, array), "parameters": {"binary_data_size": len(raw)}}, raw


def output_header(name: str, array: np.ndarray) -> dict[str, Any]:
    """Return the name, datatype and shape of an output tensor with the values `array` [N, …]."""
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
            f"{where}: binary data has {len(raw)} bytes; {count} values of {datatype} require "
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
            f"{where}: binary data is malformed; expected {count} elements, each a length in "
            "4 bytes followed by that many bytes."
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
        raise BadRequest(
            f"{where}: data has {len(values)} values; its shape {shape} requires {count}."
        )
    if len(nested) > 1 and _without_ones(nested) != _without_ones(shape):
        raise BadRequest(f"{where}: data is nested as {nested}; its shape is {shape}.")
    if datatype == "BYTES":
        return _strings_from_json(values, where, base64_encoded=base64_encoded)
    accepted: set[type] = {bool} if datatype == "BOOL" else {int}
    if datatype[0] == "F":
        accepted = {int, float}
    unknown = None in values
    if not set(map(type, values)) <= accepted | {type(None)}:
        raise BadRequest(f"{where}: data must contain only {datatype} values or null.")
    try:
        # Floating-point arrays hold null as NaN; for other datatypes it needs an object array.
        holds_all = not unknown or datatype[0] == "F"
        with np.errstate(over="raise"):
            return np.array(values, DTYPES[datatype]) if holds_all else object_array(values)
    except (OverflowError, FloatingPointError):
        known = [value for value in values if value is not None]
        raise BadRequest(
            f"{where}: data ranges from {str(min(known))[:40]} to {str(max(known))[:40]}; "
            f"{datatype} cannot hold it."
        ) from None


def _without_ones(shape: list[int]) -> list[int]:
    return [size for size in shape if size != 1]


def flatten(data: list[Any], where: str) -> tuple[list[int], list[Any]]:
    """Return the shape of nested lists and their leaves in order.

    The leaves stay in a list: a numpy array of strings would use the size of the longest one for
    every element. Raises BadRequest if the lists are ragged or more than MAX_RANK deep.
    """
    shape = [len(data)]
    while data and any(isinstance(value, list) for value in data):
        if not all(isinstance(value, list) for value in data) or len(set(map(len, data))) != 1:
            raise BadRequest(
                f"{where}: the lists in data are ragged; expected equal lengths. Where the length "
                f"of rows is free, pad them and send parameter '{LENGTHS}'."
            )
        if len(shape) == MAX_RANK:
            raise BadRequest(f"{where}: data is nested more than {MAX_RANK} levels deep.")
        shape.append(len(data[0]))
        data = list(chain.from_iterable(data))
    return shape, data


def cut_rows(name: str, array: np.ndarray, lengths: Any, is_free: bool) -> np.ndarray:
    """Return the rows of an input [N, L, …] without padding, as an object array [N].

    lengths: parameter LENGTHS, a list of N integers or, in gRPC, a text of them with commas.
    is_free: whether the input has a free length. Raises BadRequest if not, or if the lengths do not
    fit the array.
    """
    if not is_free:
        raise BadRequest(
            f"input '{name}' has parameter '{LENGTHS}', but the length of its rows is not free. "
            "Omit it."
        )
    count, most = array.shape[:2]
    found = lengths
    if isinstance(lengths, str):
        parts = lengths.split(",")
        found = [int(part) if part.strip().isdecimal() else None for part in parts]
    if (
        not isinstance(found, list)
        or len(found) != count
        or not all(type(length) is int and 0 <= length <= most for length in found)
    ):
        raise BadRequest(
            f"input '{name}': parameter '{LENGTHS}' is {abbreviated(lengths)}; expected {count} "
            f"integers from 0 to {most}, the length of each row."
        )
    rows = np.empty(count, object)
    for row, length in enumerate(found):
        rows[row] = array[row, :length]
    return rows


def _strings_from_json(values: list[Any], where: str, *, base64_encoded: bool) -> np.ndarray:
    if not all(isinstance(value, str | None) for value in values):
        raise BadRequest(f"{where}: BYTES data must contain only strings or null.")
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
    """Decode base64. Raises BadRequest if `value` is not valid base64."""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: not valid base64 ({error}).") from error


def object_array(values: list[Any]) -> np.ndarray:
    """Return the values as an array of dtype object and shape [len(values)]."""
    array = np.empty(len(values), object)
    array[:] = values
    return array
