"""Encode the client's requests and decode responses: records as JSON, columns as tensors."""

import base64
import datetime
import decimal
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import orjson

if TYPE_CHECKING:
    import pandas as pd

    from train.tasks import Arrays

HEADER_LENGTH = "Inference-Header-Content-Length"
# Characters of an error response that is not the server's own JSON.
MOST_CHARACTERS = 300
# Largest whole number up to which float64 has every one.
MOST_EXACT = 2**53


def is_frame(value: Any) -> "TypeGuard[pd.DataFrame]":
    """Whether a value is a pandas DataFrame. Does not import pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def frame_records(frame: "pd.DataFrame") -> list[dict[Hashable, Any]]:
    """Return the rows of a DataFrame as records. Raises ValueError if column names repeat."""
    if not frame.columns.is_unique:
        raise ValueError("the DataFrame has two columns of one name; rename one of them.")
    # As objects: a column of integers next to one of floats stays one of integers.
    return frame.astype(object).to_dict("records")


def predictions_frame(predictions: Sequence[Mapping[str, Any]], index: Any) -> "pd.DataFrame":
    """Return predictions as a DataFrame; nested ones as columns `output.name`."""
    import pandas as pd

    return pd.DataFrame([_flat(each) for each in predictions], index=index)


def _flat(prediction: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return flat


def wire_record(record: Any) -> Any:
    """Return a record, or the only value of one, with bytes as KServe V1 has them."""
    if isinstance(record, Mapping):
        return {str(name): _plain_value(value) for name, value in record.items()}
    return _plain_value(record)


def _plain_value(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value) if value.dtype != object else value.tolist()
    return value


def to_json(value: Any) -> bytes:
    """Return JSON; NaN and infinities as null. Raises ValueError for values that JSON lacks."""
    try:
        return orjson.dumps(value, default=_json_value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        reason = error.__cause__ or error
        raise ValueError(f"a record cannot be sent: {reason}") from error


def _json_value(value: Any) -> Any:
    """Return the JSON form of a value that orjson does not write by itself."""
    if _is_missing(value):
        return None
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"{value!r} is of type {type(value).__name__}.")


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, NaT or pandas' NA."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or _is_nan(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating, np.datetime64)) and bool(value != value)


def wire_columns(columns: Mapping[str, Any]) -> "tuple[Arrays, int]":
    """Return columns as arrays [N, ...] that tensors can hold, and N, their number of rows.

    Raises ValueError for columns of different lengths or of values that tensors cannot hold.
    """
    arrays = {name: _plain_array(name, values) for name, values in columns.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise ValueError(f"columns differ in their number of rows: {shown or 'there are none'}.")
    return arrays, next(iter(lengths.values()))


def _plain_array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths, such as sets of labels
        array = np.empty(len(values), object)
        array[:] = values
    if array.ndim == 0:
        raise ValueError(f"column '{name}' is a single value; expected one row per record.")
    match array.dtype.kind:
        case "U" | "S" | "O":
            return _object_array(name, array)
        case "M":
            texts = np.datetime_as_string(array).astype(object)
            texts[np.isnat(array)] = b""
            return texts
        case "f" if array.dtype.itemsize == 2:
            return array.astype(np.float32)
        case "b" | "i" | "u" | "f":
            return array
    raise ValueError(f"column '{name}' has the type {array.dtype}, which tensors cannot hold.")


def _object_array(name: str, array: np.ndarray) -> np.ndarray:
    """Return numbers as float64, if float64 holds them exactly, and anything else as bytes."""
    missing = np.array([_is_missing(value) for value in array.ravel()])
    present = array.ravel()[~missing]
    if len(present) and all(_is_exact_number(value) for value in present):
        numbers = np.full(array.size, np.nan)
        numbers[~missing] = present.astype(np.float64)
        return numbers.reshape(array.shape)
    values = np.full(array.size, b"", object)
    values[~missing] = [_to_bytes(name, value) for value in present]
    return values.reshape(array.shape)


def _is_exact_number(value: Any) -> bool:
    if isinstance(value, (float, np.floating)):
        return True
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_whole and abs(int(value)) <= MOST_EXACT


def _to_bytes(name: str, value: Any) -> bytes:
    """Return the element of a BYTES tensor for a value. The server reads empty ones as missing."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    try:
        text = to_json(value)
    except ValueError as error:
        raise ValueError(f"column '{name}': {error}") from error
    return text.strip(b'"')


def encode_tensors(inputs: "Arrays", parameters: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of an infer request with binary tensors in both directions.

    inputs: [N, ...] by name; BYTES are object arrays of bytes or str.
    """
    # Imported here, because it sets environment variables, which importing a client must not do.
    from serve.protocol import tensors

    headers, raws = [], []
    for name, array in inputs.items():
        header, raw = tensors.encode_raw(name, array)
        headers.append(header)
        raws.append(raw)
    request = {
        "inputs": headers,
        "parameters": {"binary_data_output": True, **parameters},
    }
    head = orjson.dumps(request)
    return b"".join([head, *raws]), {
        HEADER_LENGTH: str(len(head)),
        "Content-Type": "application/octet-stream",
    }


def decode_tensors(body: bytes, headers: Mapping[str, str]) -> "Arrays":
    """Return the outputs [N, ...] of an infer response; BYTES as an object array of str."""
    from serve.protocol import tensors

    view = memoryview(body)
    length = int(headers.get(HEADER_LENGTH, len(body)))
    rest = view[length:]
    outputs: dict[str, np.ndarray] = {}
    for output in orjson.loads(view[:length])["outputs"]:
        size = (output.get("parameters") or {}).get("binary_data_size")
        raw = None if size is None else rest[:size]
        rest = rest[size or 0 :]
        name, array = tensors.decode(output, raw)
        if array.dtype == object:
            decoded = [each.decode() if isinstance(each, bytes) else each for each in array.ravel()]
            array = tensors.object_array(decoded).reshape(array.shape)
        outputs[name] = array
    return outputs


def error_message(body: bytes) -> str:
    """Return the message of an error response."""
    try:
        return str(orjson.loads(body)["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = " ".join(body.decode(errors="replace").split())
        return text[:MOST_CHARACTERS] or "the response is empty"
