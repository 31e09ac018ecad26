"""Open Inference Protocol v2 over REST: decoding of request bodies, encoding of responses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from serve.errors import BadRequest, PayloadTooLarge, abbreviated
from serve.protocol import tensors
from serve.protocol.fields import UnknownFields, match_fields, plain_fields
from train.bundle.manifest import Manifest
from train.tasks import Arrays, Columns
from train.values.exact_json import loads_exact
from train.values.pictures import is_picture_file
from train.values.ragged import FREE
from train.values.records import DTYPES

HEADER_LENGTH = "inference-header-content-length"
EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "statistics",
]
# A decimal HEADER_LENGTH must have fewer digits: parsing very long ones is slow.
MAX_DIGITS = 16
# JSON up to this many bytes is parsed exactly. Longer JSON is parsed by a faster parser, in which
# integers of more than 64 bits lose digits.
MAX_EXACT = 1 << 18
# Tensor parameters that cannot be ignored: the response would not be what the client requested.
UNSUPPORTED = ("shared_memory_region", "classification")


@dataclass(frozen=True)
class InferRequest:
    """A decoded inference request.

    id: the client's id, which the response repeats. columns: field → a value for each record.
    outputs: requested output → whether to send it as binary data; if empty, all outputs are sent
    as `binary` says. parameters: parameters of the request, such as timeout and priority.
    """

    id: str | None
    columns: Columns
    outputs: dict[str, bool] = field(default_factory=dict)
    binary: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)


def json_bytes(body: bytes, header_length: str | None) -> int:
    """Return how many bytes of a body are JSON; all of them if `header_length` is invalid.

    header_length: value of the header HEADER_LENGTH, or None.
    """
    if header_length is None or not header_length.isdecimal() or len(header_length) >= MAX_DIGITS:
        return len(body)
    return min(int(header_length), len(body))


def decode(
    body: bytes,
    header_length: str | None,
    manifest: Manifest,
    max_rows: int,
    max_json_bytes: int = 2**31,
    *,
    is_image: bool = False,
    unknown_fields: UnknownFields = "ignore",
) -> InferRequest:
    """Decode the body of an inference request.

    header_length: value of the header HEADER_LENGTH, or None. is_image: whether the content type
    is that of an image file. Raises BadRequest if the body is not a valid inference request for
    this model, PayloadTooLarge if it has more than `max_rows` rows or `max_json_bytes` of JSON.
    """
    view = memoryview(body)
    split = len(body)
    if header_length is not None:
        decimal = header_length.isdecimal() and len(header_length) < MAX_DIGITS
        if not decimal or int(header_length) > len(body):
            raise BadRequest(
                f"{HEADER_LENGTH} is '{header_length[:40]}'; expected 0 to {len(body)}, the length "
                "of the body."
            )
        split = int(header_length)
        if split == 0:
            return InferRequest(None, _raw_columns(view, manifest, max_rows, is_image=is_image))
    elif is_image:
        return InferRequest(None, _raw_columns(view, manifest, max_rows, is_image=True))
    request = parse_json(view[:split], max_json_bytes)
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise BadRequest("'inputs' is missing or is not a list with at least one tensor.")
    arrays, lengths, rest = {}, {}, view[split:]
    for tensor in inputs:
        raw, rest = _take_raw(tensor, rest)
        name, array = tensors.decode(tensor, raw)
        check_supported(parameters_of(tensor), f"input '{name[:100]}'")
        if name in arrays:
            raise BadRequest(f"input '{name[:100]}' is given more than once.")
        arrays[name], lengths[name] = array, parameters_of(tensor).get(tensors.LENGTHS)
    if len(rest):
        raise BadRequest(f"{len(rest)} bytes follow the last tensor's binary data.")
    parameters = parameters_of(request)
    binary = boolean_parameter(parameters, "binary_data_output", default=False)
    return InferRequest(
        id=_optional(request, "id", str),
        columns=tensor_columns(arrays, manifest, max_rows, unknown_fields, lengths),
        outputs=requested_outputs(request.get("outputs"), manifest, binary=binary),
        binary=binary,
        parameters=parameters,
    )


def encode(
    request: InferRequest, predictions: Arrays, manifest: Manifest, version: str
) -> tuple[bytes, int | None]:
    """Return the response body, and the length of its JSON if binary data follows, else None.

    predictions: output name → array of shape [N, …], one row per record.
    """
    outputs, raws = [], []
    for name in request.outputs or predictions:
        if request.outputs.get(name, request.binary):
            output, raw = tensors.encode_raw(name, predictions[name])
            raws.append(raw)
        else:
            output = tensors.encode_json(name, predictions[name])
        outputs.append(output)
    response: dict[str, Any] = {"model_name": manifest.name, "model_version": version}
    if request.id is not None:
        response["id"] = request.id
    response["outputs"] = outputs
    header = orjson.dumps(response, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([header, *raws]), len(header)) if raws else (header, None)


def check_rows(count: int, max_rows: int) -> None:
    """Raise PayloadTooLarge if a request has more than `max_rows` rows."""
    if count > max_rows:
        raise PayloadTooLarge(
            f"the request has {count} rows; at most {max_rows} are accepted. Split the request."
        )


def parse_json(body: bytes | memoryview, max_bytes: int = 2**31) -> dict[str, Any]:
    """Parse a JSON object.

    Raises BadRequest if the body is not a JSON object, PayloadTooLarge if it has more than
    `max_bytes`.
    """
    if len(body) > max_bytes:
        raise PayloadTooLarge(
            f"the JSON has {len(body)} bytes; at most {max_bytes} are accepted. Send tensors as "
            "binary data, or split the request."
        )
    try:
        value = loads_exact(body) if len(body) <= MAX_EXACT else orjson.loads(body)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object.")
    return value


def _take_raw(tensor: Any, rest: memoryview) -> tuple[memoryview | None, memoryview]:
    size = parameters_of(tensor).get("binary_data_size") if isinstance(tensor, dict) else None
    if size is None:
        return None, rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise BadRequest(
            f"binary_data_size is {abbreviated(size)}; expected an integer from 0 to {len(rest)}, "
            "the number of bytes left."
        )
    return rest[:size], rest[size:]


def parameters_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a request or tensor. Raises BadRequest if they are not an object."""
    return _optional(value, "parameters", dict) or {}


def _optional(value: Mapping[str, Any], key: str, kind: type) -> Any:
    found = value.get(key)
    if found is not None and not isinstance(found, kind):
        raise BadRequest(f"'{key}' is not a {'string' if kind is str else 'JSON object'}.")
    return found


def boolean_parameter(parameters: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Return a boolean parameter. Raises BadRequest if it has another type."""
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise BadRequest(f"parameter '{key}' is {abbreviated(value)!r}; expected true or false.")
    return value


def check_supported(parameters: Any, where: str) -> None:
    """Raise BadRequest if a tensor has a parameter that is not supported."""
    for name in UNSUPPORTED:
        if name in parameters:
            raise BadRequest(f"{where}: parameter '{name}' is not supported. Omit it.")


def tensor_columns(
    arrays: dict[str, np.ndarray],
    manifest: Manifest,
    max_rows: int,
    unknown_fields: UnknownFields = "ignore",
    lengths: Mapping[str, Any] | None = None,
) -> Columns:
    """Return a request's tensors as columns; row i of every tensor belongs to record i.

    arrays: field → array of shape [N, …]. lengths: field → the lengths of its rows, where the
    length is free; rows without are not padded. Raises BadRequest if they do not match the model,
    PayloadTooLarge if N is above `max_rows`.
    """
    fields = {tensor.name: tensor for tensor in manifest.inputs}
    arrays = dict(plain_fields(arrays, manifest, "the request"))
    left_out = match_fields(arrays, manifest, unknown_fields, "the request")
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        raise BadRequest("all inputs must have the same number of rows, at least one.")
    check_rows(max(counts), max_rows)
    columns: dict[str, Any] = {name: [None] * max(counts) for name in left_out}
    for name, array in arrays.items():
        if name not in fields:
            continue
        # Strings have one value per row; for an image it is the file. Many clients send [N, 1].
        expected = [-1] if array.dtype == object else fields[name].shape
        if len(expected) == 1 and array.shape[1:] == (1,):
            array = array[:, 0]
        if array.ndim != len(expected):
            raise BadRequest(
                f"input '{name}' has shape {list(array.shape)}; expected {expected}, where -1 is "
                "the number of rows."
            )
        given = (lengths or {}).get(name)
        is_free = FREE in fields[name].shape[1:]
        columns[name] = array if given is None else tensors.cut_rows(name, array, given, is_free)
    return columns


def _raw_columns(raw: memoryview, manifest: Manifest, max_rows: int, *, is_image: bool) -> Columns:
    """Decode a raw binary request: the body is the data of the only input, without JSON.

    For an image, it is one image file, recognized by the content type or the first bytes, or else
    the raw pixels of one or more images.
    """
    if len(manifest.inputs) != 1:
        raise BadRequest(
            f"'{manifest.name}' has {len(manifest.inputs)} inputs; a body without JSON "
            f"({HEADER_LENGTH}: 0) is accepted for models with one."
        )
    tensor = manifest.inputs[0]
    if not len(raw):
        raise BadRequest("the body is empty.")
    dtype = DTYPES[tensor.datatype]
    sizes = [size for size in tensor.shape[1:] if size != FREE]  # of one position if it is free
    row_bytes = dtype.itemsize * math.prod(sizes)
    if len(tensor.shape) == 4 and (is_image or is_picture_file(raw)):
        return {tensor.name: [bytes(raw)]}
    if tensor.datatype != "BYTES" and len(raw) % row_bytes == 0:
        values = np.frombuffer(raw, dtype.newbyteorder("<"))
        if sizes != tensor.shape[1:]:
            return {tensor.name: values.reshape(1, -1, *sizes)}
        check_rows(len(raw) // row_bytes, max_rows)
        return {tensor.name: values.reshape(tensor.shape)}
    if tensor.datatype != "BYTES" and len(tensor.shape) != 4:
        raise BadRequest(
            f"the body has {len(raw)} bytes; expected a multiple of {row_bytes}, the size of a row."
        )
    return {tensor.name: [bytes(raw)]}


def requested_outputs(outputs: Any, manifest: Manifest, *, binary: bool = False) -> dict[str, bool]:
    """Return the requested outputs, each with whether to send it as binary data.

    binary: the default for outputs without the parameter binary_data. Raises BadRequest if
    `outputs` is malformed or names an unknown output.
    """
    if outputs is None:
        return {}
    known = [tensor.name for tensor in manifest.outputs]
    if not isinstance(outputs, list) or not all(isinstance(item, dict) for item in outputs):
        raise BadRequest("'outputs' is not a list of JSON objects.")
    for item in outputs:
        if item.get("name") not in known:
            raise BadRequest(
                f"output '{abbreviated(item.get('name'), 100)}' is unknown; "
                f"'{manifest.name}' has {', '.join(known)}."
            )
        check_supported(parameters_of(item), f"output '{item['name']}'")
    return {
        item["name"]: boolean_parameter(parameters_of(item), "binary_data", default=binary)
        for item in outputs
    }
