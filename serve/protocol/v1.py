"""KServe V1: {"instances": […]} → {"predictions": […]}; bytes travel as {"b64": "…"}."""

from typing import Any

import numpy as np
import orjson

from serve.errors import BadRequest
from serve.protocol.tensors import flatten, from_base64
from serve.protocol.v2 import check_rows, parse_json
from train.bundle.manifest import Manifest
from train.tasks import Arrays, Record


def decode(body: bytes, manifest: Manifest, max_rows: int) -> list[Record]:
    """Return the records of the instances.

    An instance is an object of fields, or for a model with one input just that field's value: an
    image is {"b64": …} or nested lists of 0..255. Raises BadRequest.
    """
    instances = parse_json(body).get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRequest("'instances' is missing or is not a list with at least one instance.")
    check_rows(len(instances), max_rows)
    names = [tensor.name for tensor in manifest.inputs]
    records: list[Record] = []
    for index, instance in enumerate(instances):
        if len(names) == 1 and not (isinstance(instance, dict) and names[0] in instance):
            instance = {names[0]: instance}
        if not isinstance(instance, dict) or set(instance) != set(names):
            raise BadRequest(f"instance {index} must have the fields {', '.join(names)}.")
        records.append(
            {name: _value(value, f"instance {index}") for name, value in instance.items()}
        )
    return records


def encode(predictions: Arrays) -> bytes:
    """Return {"predictions": [{output: value, …}, …]}."""
    columns = {name: array.tolist() for name, array in predictions.items()}
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return orjson.dumps({"predictions": rows})


def _value(value: Any, where: str) -> Any:
    if isinstance(value, dict) and isinstance(value.get("b64"), str):
        return from_base64(value["b64"], where)
    if isinstance(value, list):
        shape, values = flatten(value, where)
        if not values or set(map(type, values)) != {int} or min(values) < 0 or max(values) > 255:
            raise BadRequest(f"{where}: an image as lists must be of whole numbers 0..255.")
        return np.array(values, np.uint8).reshape(shape)
    return value
