"""Tensors of the Open Inference Protocol v2: JSON values or raw bytes ↔ numpy arrays.

Nothing is allocated by a shape before the data has been seen to be as long as the shape says.
"""

import base64
import binascii
import math
import struct
from typing import Any

import numpy as np

from serve.errors import BadRequest
from train.tasks.records import DATATYPES, DTYPES

MAX_RANK = 8


def decode(tensor: Any, raw: memoryview | None) -> tuple[str, np.ndarray]:
    """Return name and array of an input tensor; BYTES become an object array of bytes.

    raw: the tensor's binary data, or None when its JSON holds "data".
    Raises BadRequest that names the tensor.
    """
    name = _field(tensor, "name", str, "input")
    where = f"input '{name}'"
    datatype = _field(tensor, "datatype", str, where)
    if datatype not in DTYPES:
        raise BadRequest(
            f"{where}: datatype '{datatype[:40]}' is unknown; expected one of {', '.join(DTYPES)}."
        )
    shape = _field(tensor, "shape", list, where)
    if not 1 <= len(shape) <= MAX_RANK or not all(
        type(size) is int and size >= 0 for size in shape
    ):
        raise BadRequest(
            f"{where}: shape must be 1 to {MAX_RANK} whole numbers from 0; the first is the batch."
        )
    count = math.prod(shape)
    if raw is not None:
        values = _from_raw(raw, datatype, count, where)
    else:
        data = _field(tensor, "data", list, where)
        base64_encoded = (tensor.get("parameters") or {}).get("content_type") == "base64"
        values = _from_json(data, datatype, count, where, base64_encoded=base64_encoded)
    return name, values.reshape(shape)


def encode_json(name: str, array: np.ndarray) -> dict[str, Any]:
    """Return an output tensor with its data inside; strings for BYTES."""
    data = array.ravel().tolist() if array.dtype == object else np.ascontiguousarray(array.ravel())
    return {**header(name, array), "data": data}


def encode_raw(name: str, array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Return an output tensor without data, and its data as bytes."""
    if array.dtype == object:
        parts = [str(value).encode() for value in array.ravel()]
        raw = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    else:
        raw = np.ascontiguousarray(array).tobytes()
    return {**header(name, array), "parameters": {"binary_data_size": len(raw)}}, raw


def header(name: str, array: np.ndarray) -> dict[str, Any]:
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
    return _objects(values)


def _from_json(
    data: list[Any], datatype: str, count: int, where: str, *, base64_encoded: bool
) -> np.ndarray:
    if datatype == "FP16":
        raise BadRequest(f"{where}: FP16 has no JSON form; send it as binary data.")
    if datatype == "BYTES":
        return _strings_from_json(data, count, where, base64_encoded=base64_encoded)
    try:
        values = np.asarray(data)
    except ValueError:
        values = np.zeros(0, object)
    kinds = {"B": "b", "F": "iuf"}.get(datatype[0], "iu")
    if values.size == 0 and count == 0:
        return np.zeros(0, DTYPES[datatype])
    if values.dtype.kind not in kinds:
        raise BadRequest(f"{where}: data must be an even list of values of {datatype}.")
    if values.size != count:
        raise BadRequest(f"{where}: {values.size} values in data; its shape makes {count}.")
    dtype = DTYPES[datatype]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise BadRequest(
                f"{where}: data reaches from {values.min()} to {values.max()}; "
                f"{datatype} holds {limits.min} to {limits.max}."
            )
    return values.astype(dtype).ravel()


def _strings_from_json(
    data: list[Any], count: int, where: str, *, base64_encoded: bool
) -> np.ndarray:
    while data and all(isinstance(value, list) for value in data):
        data = [value for inner in data for value in inner]
    if not all(isinstance(value, str) for value in data):
        raise BadRequest(f"{where}: data of BYTES must be strings.")
    if len(data) != count:
        raise BadRequest(f"{where}: {len(data)} values in data; its shape makes {count}.")
    if base64_encoded:
        return _objects([from_base64(value, where) for value in data])
    return _objects([value.encode(errors="surrogatepass") for value in data])


def from_base64(value: str, where: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: not valid base64 ({error}).") from error


def _objects(values: list[bytes]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array
