"""KServe V1: decoding of {"instances": […]} and encoding of {"predictions": […]}.

Binary values are sent as {"b64": "…"}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from serve.errors import BadRequest
from serve.protocol.fields import UnknownFields, match_fields, plain_fields
from serve.protocol.tensors import flatten, from_base64
from serve.protocol.v2 import InferRequest, boolean_parameter, check_rows, parameters_of, parse_json
from train.bundle.manifest import Manifest, TensorMetadata
from train.tasks import Arrays
from train.values.ragged import FREE
from train.values.records import flatten_record


def decode(
    body: bytes,
    manifest: Manifest,
    max_rows: int,
    max_json_bytes: int = 2**31,
    unknown_fields: UnknownFields = "ignore",
) -> InferRequest:
    """Decode the instances into columns, and read the request's parameters.

    An instance is an object of fields, or just the value if the model has one input. An image is
    {"b64": …}, a data URI, or nested lists of 0..255 with shape [H, W, C]; [H, W] is accepted if
    the model has one channel and the same height and width. Unknown values are null; they may be
    omitted if training had missing values in that field.

    Raises BadRequest if the body is malformed or does not match the model, PayloadTooLarge if the
    body has more than `max_rows` instances or `max_json_bytes`.
    """
    request = parse_json(body, max_json_bytes)
    instances = request.get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRequest("'instances' is missing or is not a list with at least one instance.")
    check_rows(len(instances), max_rows)
    fields = {tensor.name: tensor for tensor in manifest.inputs}
    single = next(iter(fields)) if len(fields) == 1 else None
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    for index, instance in enumerate(instances):
        where = f"instance {index}"
        if isinstance(instance, dict) and instance.keys() != fields.keys():
            instance = plain_fields(_flat(instance, fields), manifest, where)
        if single and (not isinstance(instance, dict) or "b64" in instance):
            instance = {single: instance}
        if not isinstance(instance, dict):
            raise BadRequest(f"instance {index} must be an object with {', '.join(fields)}.")
        if instance.keys() != fields.keys():
            match_fields(instance, manifest, unknown_fields, where)
        for name, tensor in fields.items():
            columns[name].append(_value(instance.get(name), tensor, where))
    parameters = parameters_of(request)
    boolean_parameter(parameters, "named", default=False)
    return InferRequest(None, columns, parameters=parameters)


def _flat(instance: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested objects to fields `outer.inner`, as in training data."""
    nested = [name for name, value in instance.items() if isinstance(value, dict)]
    inner = {name: instance[name] for name in nested if name not in fields}
    if not inner or "b64" in instance:
        return instance
    rest = {name: value for name, value in instance.items() if name not in inner}
    return {**flatten_record(inner), **rest}


def encode(predictions: Arrays, classes: Sequence[str] | None = None) -> bytes:
    """Return the body {"predictions": [{output: value, …}, …]}.

    predictions: output name → array of shape [N, …], one row per record. classes: if given, the
    probabilities of a record are an object with class names as keys; otherwise they are a list.
    """
    columns: dict[str, list[Any]] = {name: array.tolist() for name, array in predictions.items()}
    if classes is not None and "probabilities" in columns:
        rows = columns["probabilities"]
        columns["probabilities"] = [dict(zip(classes, row, strict=True)) for row in rows]
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return orjson.dumps({"predictions": rows})


def _value(value: Any, tensor: TensorMetadata, where: str) -> Any:
    if isinstance(value, dict) and isinstance(value.get("b64"), str):
        return from_base64(value["b64"], where)
    if isinstance(value, list) and tensor.datatype == "UINT8":
        shape, values = flatten(value, where)
        if not values or set(map(type, values)) != {int} or min(values) < 0 or max(values) > 255:
            raise BadRequest(f"{where}: an image as lists must contain only integers 0..255.")
        size = tensor.shape[1:]
        expected = [shape[0], *size[1:]] if size[:1] == [FREE] else size
        if len(shape) != len(size) and [*shape, 1] != expected:
            raise BadRequest(f"{where} has shape {shape}; expected {size}.")
        return np.array(values, np.uint8).reshape(shape)
    return value
