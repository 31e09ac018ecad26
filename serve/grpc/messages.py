"""Conversion of the Open Inference Protocol v2's gRPC messages to inference requests and back."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from serve.errors import BadRequest
from serve.protocol import tensors, v2
from serve.protocol.fields import UnknownFields
from train.bundle.manifest import Manifest
from train.tasks import Arrays
from train.values.records import DTYPES

PACKAGE = "inference"

# Compiled from inference.proto; the command is at the top of that file.
DESCRIPTORS = Path(__file__).with_name("inference.binpb")
# Name of the oneof that holds a parameter's value.
CHOICE = "parameter_choice"

# Datatype → the field of InferTensorContents that holds it. FP16 has none and is sent as raw bytes.
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# These fields also hold 8-bit and 16-bit integers, as 32-bit values.
WIDE = {"int_contents": np.dtype(np.int32), "uint_contents": np.dtype(np.uint32)}


def decode(
    request: Any, manifest: Manifest, max_rows: int, unknown_fields: UnknownFields = "ignore"
) -> v2.InferRequest:
    """Decode a ModelInferRequest. If its tensors are raw bytes, so are those of the response.

    Raises BadRequest if the message is not a valid inference request for this model,
    PayloadTooLarge if it has more than `max_rows` rows.
    """
    raws = request.raw_input_contents
    if not request.inputs:
        raise BadRequest("the request has no inputs; expected at least one tensor.")
    if raws and len(raws) != len(request.inputs):
        raise BadRequest(
            f"the request has {len(request.inputs)} inputs and {len(raws)} raw_input_contents; "
            "expected one for each input, or none."
        )
    arrays: dict[str, np.ndarray] = {}
    lengths: dict[str, Any] = {}
    for index, tensor in enumerate(request.inputs):
        v2.check_supported(tensor.parameters, f"input '{tensor.name}'")
        name, array = _array(tensor, memoryview(raws[index]) if raws else None)
        if name in arrays:
            raise BadRequest(f"input '{name}' is given more than once.")
        arrays[name] = array
        lengths[name] = _values(tensor.parameters).get(tensors.LENGTHS)
    for output in request.outputs:
        v2.check_supported(output.parameters, f"output '{output.name}'")
    names = [{"name": output.name} for output in request.outputs] or None
    return v2.InferRequest(
        id=request.id or None,
        columns=v2.tensor_columns(arrays, manifest, max_rows, unknown_fields, lengths),
        outputs=dict.fromkeys(v2.requested_outputs(names, manifest), bool(raws)),
        binary=bool(raws),
        parameters=_values(request.parameters),
    )


def encode(request: v2.InferRequest, predictions: Arrays, manifest: Manifest, version: str) -> Any:
    """Return a ModelInferResponse.

    predictions: output name → array of shape [N, …], one row per record. All outputs are raw bytes
    if the request's inputs were or if a datatype has no typed field; otherwise all are typed.
    """
    response = types.ModelInferResponse(
        model_name=manifest.name, model_version=version, id=request.id or ""
    )
    headers = [
        tensors.output_header(name, predictions[name]) for name in request.outputs or predictions
    ]
    raw = request.binary or any(header["datatype"] not in CONTENTS for header in headers)
    for header in headers:
        array = predictions[header["name"]]
        output = response.outputs.add(**header)
        if raw:
            response.raw_output_contents.append(tensors.encode_raw(header["name"], array)[1])
        else:
            values = array.ravel().tolist()
            if array.dtype == object:
                values = [str(value).encode() for value in values]
            getattr(output.contents, CONTENTS[header["datatype"]]).extend(values)
    return response


def _array(tensor: Any, raw: memoryview | None) -> tuple[str, np.ndarray]:
    # One size more than MAX_RANK is enough to detect a rank that is too high.
    shape = list(tensor.shape[: tensors.MAX_RANK + 1])
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": shape}
    if raw is None:
        name, datatype, shape = tensors.tensor_header(entry)
        return name, _from_contents(tensor.contents, datatype, f"input '{name}'", shape)
    if tensor.HasField("contents"):
        raise BadRequest(
            f"input '{tensor.name}' has both contents and raw_input_contents; expected one."
        )
    return tensors.decode(entry, raw)


def _from_contents(contents: Any, datatype: str, where: str, shape: list[int]) -> np.ndarray:
    wanted = CONTENTS.get(datatype)
    if wanted is None:
        raise BadRequest(f"{where}: {datatype} has no typed form; send it as raw_input_contents.")
    given = [field.name for field, _ in contents.ListFields()]
    if not set(given) <= {wanted}:
        raise BadRequest(
            f"{where}: {datatype} values are in {', '.join(given)}; expected {wanted}."
        )
    values, count = getattr(contents, wanted), math.prod(shape)
    if len(values) != count:
        raise BadRequest(
            f"{where}: {wanted} has {len(values)} values; its shape {shape} requires {count}."
        )
    if datatype == "BYTES":
        return tensors.object_array(list(values)).reshape(shape)
    wide = np.array(values, WIDE.get(wanted, DTYPES[datatype]))
    array = wide.astype(DTYPES[datatype])
    if wanted in WIDE and not np.array_equal(array, wide):
        raise BadRequest(
            f"{where}: values in {wanted} range from {wide.min()} to {wide.max()}; "
            f"{datatype} cannot hold them."
        )
    return array.reshape(shape)


def _values(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof(CHOICE)) is not None
    }


def _load_types() -> SimpleNamespace:
    """Return a namespace of the message classes."""
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    # A private pool, because a client library in the same process may register the same names.
    classes = message_factory.GetMessages(descriptors.file, descriptor_pool.DescriptorPool())
    return SimpleNamespace(
        **{name.removeprefix(f"{PACKAGE}."): found for name, found in classes.items()}
    )


types: Any = _load_types()
