"""gRPC messages of the Open Inference Protocol v2: made of a table, to and from our own requests.

The table is the published protocol as far as it is served here: the one of KServe, and Triton's
extensions. What else a client sends is skipped, as protobuf has it.
"""

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from serve.errors import BadRequest
from serve.protocol import tensors, v2
from train.bundle.manifest import Manifest
from train.tasks import Arrays
from train.tasks.records import DTYPES

PACKAGE = "inference"

# A message inside another comes after it.
MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ModelReadyRequest": "string name = 1; string version = 2",
    "ModelReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name = 1; string version = 2; repeated string extensions = 3",
    "ModelMetadataRequest": "string name = 1; string version = 2",
    "ModelMetadataResponse": """
        string name = 1; repeated string versions = 2; string platform = 3;
        repeated ModelMetadataResponse.TensorMetadata inputs = 4;
        repeated ModelMetadataResponse.TensorMetadata outputs = 5""",
    "ModelMetadataResponse.TensorMetadata": """
        string name = 1; string datatype = 2; repeated int64 shape = 3""",
    "InferParameter": """
        oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3;
        oneof double double_param = 4; oneof uint64 uint64_param = 5""",
    "InferTensorContents": """
        repeated bool bool_contents = 1; repeated int32 int_contents = 2;
        repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4;
        repeated uint64 uint64_contents = 5; repeated float fp32_contents = 6;
        repeated double fp64_contents = 7; repeated bytes bytes_contents = 8""",
    "ModelInferRequest": """
        string model_name = 1; string model_version = 2; string id = 3;
        map InferParameter parameters = 4; repeated ModelInferRequest.InferInputTensor inputs = 5;
        repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6;
        repeated bytes raw_input_contents = 7""",
    "ModelInferRequest.InferInputTensor": """
        string name = 1; string datatype = 2; repeated int64 shape = 3;
        map InferParameter parameters = 4; InferTensorContents contents = 5""",
    "ModelInferRequest.InferRequestedOutputTensor": """
        string name = 1; map InferParameter parameters = 2""",
    "ModelInferResponse": """
        string model_name = 1; string model_version = 2; string id = 3;
        map InferParameter parameters = 4;
        repeated ModelInferResponse.InferOutputTensor outputs = 5;
        repeated bytes raw_output_contents = 6""",
    "ModelInferResponse.InferOutputTensor": """
        string name = 1; string datatype = 2; repeated int64 shape = 3;
        map InferParameter parameters = 4; InferTensorContents contents = 5""",
    "RepositoryIndexRequest": "string repository_name = 1; bool ready = 2",
    "RepositoryIndexResponse": "repeated RepositoryIndexResponse.ModelIndex models = 1",
    "RepositoryIndexResponse.ModelIndex": """
        string name = 1; string version = 2; string state = 3; string reason = 4""",
    "ModelRepositoryParameter": """
        oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3;
        oneof bytes bytes_param = 4""",
    "RepositoryModelLoadRequest": """
        string repository_name = 1; string model_name = 2;
        map ModelRepositoryParameter parameters = 3""",
    # Triton's answer is empty; these fields are KServe's.
    "RepositoryModelLoadResponse": "string model_name = 1; bool isLoaded = 2",
    "RepositoryModelUnloadRequest": """
        string repository_name = 1; string model_name = 2;
        map ModelRepositoryParameter parameters = 3""",
    "RepositoryModelUnloadResponse": "string model_name = 1; bool isUnloaded = 2",
    "ModelConfigRequest": "string name = 1; string version = 2",
    "ModelConfigResponse": "ModelConfig config = 1",
    "ModelConfig": """
        string name = 1; string platform = 2; string backend = 17; int32 max_batch_size = 4;
        repeated ModelInput input = 5; repeated ModelOutput output = 6;
        ModelDynamicBatching dynamic_batching = 11; ModelResponseCache response_cache = 24""",
    "ModelInput": "string name = 1; DataType data_type = 2; repeated int64 dims = 4",
    "ModelOutput": "string name = 1; DataType data_type = 2; repeated int64 dims = 3",
    "ModelDynamicBatching": """
        repeated int32 preferred_batch_size = 1; uint64 max_queue_delay_microseconds = 2;
        uint64 priority_levels = 4; uint64 default_priority_level = 5;
        ModelQueuePolicy default_queue_policy = 6""",
    "ModelQueuePolicy": """
        TimeoutAction timeout_action = 1; uint64 default_timeout_microseconds = 2;
        bool allow_timeout_override = 3; uint32 max_queue_size = 4""",
    "ModelResponseCache": "bool enable = 1",
    "ModelStatisticsRequest": "string name = 1; string version = 2",
    "ModelStatisticsResponse": "repeated ModelStatistics model_stats = 1",
    "ModelStatistics": """
        string name = 1; string version = 2; uint64 inference_count = 4;
        uint64 execution_count = 5; InferStatistics inference_stats = 6""",
    "InferStatistics": """
        StatisticDuration success = 1; StatisticDuration fail = 2; StatisticDuration queue = 3;
        StatisticDuration compute_input = 4; StatisticDuration compute_infer = 5;
        StatisticDuration compute_output = 6; StatisticDuration cache_hit = 7;
        StatisticDuration cache_miss = 8""",
    "StatisticDuration": "uint64 count = 1; uint64 ns = 2",
}
# Numbered from 0. Triton's data types come in the order of ours.
ENUMS = {
    "DataType": [
        "TYPE_INVALID",
        *(f"TYPE_{name}" for name in DTYPES if name != "BYTES"),
        "TYPE_STRING",
    ],
    "TimeoutAction": ["REJECT", "DELAY"],
}
FIELD = re.compile(r"(?:(repeated|map|oneof) )?([\w.]+) (\w+) = (\d+)")
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
# Parameters of tensors that ask for what an answer without it would silently lack.
UNSUPPORTED = ("shared_memory_region", "classification")


def decode(request: Any, manifest: Manifest, max_rows: int) -> v2.InferRequest:
    """Read a ModelInferRequest. The answer is to be raw bytes where the request's tensors were.

    Raises BadRequest for whatever is not an infer request of this model, BodyTooLarge.
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
        _check_parameters(tensor, "input")
        name, array = _array(tensor, memoryview(raws[index]) if raws else None)
        if name in arrays:
            raise BadRequest(f"input '{name}' comes more than once.")
        arrays[name] = array
    for output in request.outputs:
        _check_parameters(output, "output")
    names = [{"name": output.name} for output in request.outputs] or None
    return v2.InferRequest(
        id=request.id or None,
        columns=v2.columns_of(arrays, manifest, max_rows),
        outputs=dict.fromkeys(v2.requested(names, manifest), bool(raws)),
        binary=bool(raws),
        parameters=_values(request.parameters),
    )


def encode(request: v2.InferRequest, predictions: Arrays, manifest: Manifest, version: str) -> Any:
    """Return a ModelInferResponse with all outputs raw, or all typed if the request was."""
    response = types.ModelInferResponse(
        model_name=manifest.name, model_version=version, id=request.id or ""
    )
    headers = [tensors.header(name, predictions[name]) for name in request.outputs or predictions]
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
        name, datatype, shape = tensors.declared(entry)
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
        return tensors.objects(list(values)).reshape(shape)
    wide = np.array(values, WIDE.get(wanted, DTYPES[datatype]))
    array = wide.astype(DTYPES[datatype])
    if wanted in WIDE and not np.array_equal(array, wide):
        raise BadRequest(
            f"{where}: {wanted} reach from {wide.min()} to {wide.max()}, "
            f"more than {datatype} holds."
        )
    return array.reshape(shape)


def _check_parameters(tensor: Any, kind: str) -> None:
    for name in UNSUPPORTED:
        if name in tensor.parameters:
            raise BadRequest(f"{kind} '{tensor.name}': parameter '{name}' is not supported here.")


def _values(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof(CHOICE)) is not None
    }


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="halyard/inference.proto", package=PACKAGE, syntax="proto3"
    )
    for name, values in ENUMS.items():
        numbered = [{"name": value, "number": number} for number, value in enumerate(values)]
        file.enum_type.add(name=name, value=numbered)
    messages: dict[str, Any] = {}
    for name, fields in MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        siblings = messages[outer].nested_type if outer else file.message_type
        messages[name] = siblings.add(name=inner)
        for kind, type_name, field, number in FIELD.findall(fields):
            if kind == "map":
                type_name = _add_entry(messages[name], name, field, type_name)
            _add_field(messages[name], kind, type_name, field, int(number))
    return file


def _add_entry(message: Any, path: str, field: str, type_name: str) -> str:
    """Add the message that a map is a list of, and return its name."""
    entry = message.nested_type.add(name=f"{field.title()}Entry", options={"map_entry": True})
    _add_field(entry, "", "string", "key", 1)
    _add_field(entry, "", type_name, "value", 2)
    return f"{path}.{entry.name}"


def _add_field(message: Any, kind: str, type_name: str, name: str, number: int) -> None:
    proto = descriptor_pb2.FieldDescriptorProto
    many = kind in ("repeated", "map")
    label = proto.LABEL_REPEATED if many else proto.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    if type_name in MESSAGES or kind == "map":
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{PACKAGE}.{type_name}"
    elif type_name in ENUMS:
        field.type, field.type_name = proto.TYPE_ENUM, f".{PACKAGE}.{type_name}"
    else:
        field.type = proto.Type.Value(f"TYPE_{type_name.upper()}")
    if kind == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name=CHOICE)
        field.oneof_index = 0


def _types() -> SimpleNamespace:
    # A pool of our own: a client's library in the same process has messages of the same names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return SimpleNamespace(
        **{
            name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
            for name in MESSAGES
            if "." not in name
        }
    )


types: Any = _types()
