"""KServe V1: {"instances": […]} → {"predictions": […]}; bytes travel as {"b64": "…"}."""

from typing import Any

import numpy as np
import orjson

from serve.errors import BadRequest
from serve.protocol.tensors import flatten, from_base64
from serve.protocol.v2 import check_rows, parse_json
from train.bundle.manifest import Manifest, TensorMetadata
from train.tasks import Arrays, Columns


def decode(body: bytes, manifest: Manifest, max_rows: int, max_json_bytes: int = 2**31) -> Columns:
    """Return the fields of the instances side by side.

    An instance is an object of fields, or for a model with one input just that field's value: an
    image is {"b64": …} or nested lists of 0..255 with channels, which one of the model's own size
    with one channel may lack; a value that is not known is null. Raises BadRequest.
    """
    instances = parse_json(body, max_json_bytes).get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRequest("'instances' is missing or is not a list with at least one instance.")
    check_rows(len(instances), max_rows)
    fields = {tensor.name: tensor for tensor in manifest.inputs}
    single = next(iter(fields)) if len(fields) == 1 else None
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    for index, instance in enumerate(instances):
        if single and not (isinstance(instance, dict) and single in instance):
            instance = {single: instance}
        if not isinstance(instance, dict) or instance.keys() != fields.keys():
            raise BadRequest(f"instance {index} {_difference(instance, list(fields))}.")
        for name, tensor in fields.items():
            columns[name].append(_value(instance[name], tensor, f"instance {index}"))
    return columns


def _difference(instance: Any, names: list[str]) -> str:
    """Say what is wrong with the fields of an instance."""
    fields = f"must have the fields {', '.join(names)}"
    if not isinstance(instance, dict):
        return fields
    if missing := [name for name in names if name not in instance]:
        return f"has no '{missing[0]}'; it {fields}, null where a value is not known"
    other = next(name for name in instance if name not in names)
    return f"has '{other[:100]}'; it {fields} and no others"


def encode(predictions: Arrays) -> bytes:
    """Return {"predictions": [{output: value, …}, …]}."""
    columns = {name: array.tolist() for name, array in predictions.items()}
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
            raise BadRequest(f"{where}: an image as lists must be of whole numbers 0..255.")
        size = tensor.shape[1:]
        if len(shape) != len(size) and [*shape, 1] != size:
            raise BadRequest(f"{where} is of shape {shape}; expected {size}.")
        return np.array(values, np.uint8).reshape(shape)
    return value
