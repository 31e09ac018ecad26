"""gRPC messages of the Open Inference Protocol v2, and their conversion to and from requests."""

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

# Compiled from inference.proto, which says how.
DESCRIPTORS = Path(__file__).with_name("inference.binpb")
# The oneof of a parameter's value.
CHOICE = "parameter_choice"

# The list of InferTensorContents that holds a datatype. FP16 is in none: it is sent as raw bytes.
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
WIDE = {"int_contents": np.dtype(np.int32), "uint_contents": np.dtype(np.uint32)}


def decode(
    request: Any, manifest: Manifest, max_rows: int, unknown_fields: UnknownFields = "ignore"
) -> v2.InferRequest:
    """Read a ModelInferRequest. The answer is to be raw bytes where the request's tensors were.

    Raises BadRequest for whatever is not an infer request of this model, PayloadTooLarge.
    """
    raws = request.raw_input_contents
    if not request.inputs:
        raise BadRequest("the request has no inputs.")
    if raws and len(raws) != len(request.inputs):
        raise BadRequest(
            f"{len(request.inputs)} inputs have {len(raws)} raw_input_contents; "
            "expected one for each, or none."
        )
    arrays: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(request.inputs):
        v2.check_supported(tensor.parameters, f"input '{tensor.name}'")
        name, array = _array(tensor, memoryview(raws[index]) if raws else None)
        if name in arrays:
            raise BadRequest(f"input '{name}' comes more than once.")
        arrays[name] = array
    for output in request.outputs:
        v2.check_supported(output.parameters, f"output '{output.name}'")
    names = [{"name": output.name} for output in request.outputs] or None
    return v2.InferRequest(
        id=request.id or None,
        columns=v2.tensor_columns(arrays, manifest, max_rows, unknown_fields),
        outputs=dict.fromkeys(v2.requested_outputs(names, manifest), bool(raws)),
        binary=bool(raws),
        parameters=_values(request.parameters),
    )


def encode(request: v2.InferRequest, predictions: Arrays, manifest: Manifest, version: str) -> Any:
    """Return a ModelInferResponse with all outputs raw, or all typed if the request was."""
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
    # A rank beyond all bounds is seen to be one without copying it.
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
        raise BadRequest(f"{where}: {datatype} has no contents; send it as raw_input_contents.")
    given = [field.name for field, _ in contents.ListFields()]
    if not set(given) <= {wanted}:
        raise BadRequest(f"{where}: {datatype} belongs in {wanted}; {', '.join(given)} came.")
    values, count = getattr(contents, wanted), math.prod(shape)
    if len(values) != count:
        raise BadRequest(f"{where}: {len(values)} values in {wanted}; its shape makes {count}.")
    if datatype == "BYTES":
        return tensors.object_array(list(values)).reshape(shape)
    wide = np.array(values, WIDE.get(wanted, DTYPES[datatype]))
    array = wide.astype(DTYPES[datatype])
    if wanted in WIDE and not np.array_equal(array, wide):
        raise BadRequest(
            f"{where}: {wanted} reach from {wide.min()} to {wide.max()}, "
            f"more than {datatype} holds."
        )
    return array.reshape(shape)


def _values(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof(CHOICE)) is not None
    }


def _load_types() -> SimpleNamespace:
    """Return the message classes by their names."""
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    # A private pool: a client's library in the same process has messages of the same names.
    classes = message_factory.GetMessages(descriptors.file, descriptor_pool.DescriptorPool())
    return SimpleNamespace(
        **{name.removeprefix(f"{PACKAGE}."): found for name, found in classes.items()}
    )


types: Any = _load_types()
