"""The gRPC service with a real bundle, called by tritonclient."""

import asyncio
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor
from ray.serve._private.grpc_util import gRPCGenericServer
from ray.serve.grpc_util import RayServegRPCContext
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from serve.access import Access, Guard
from serve.config import ServeConfig
from serve.errors import (
    BadRequest,
    ClientDisconnected,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    RequestError,
    RequestTimeout,
    Unauthorized,
)
from serve.grpc import messages
from serve.grpc import service as protocol
from serve.grpc.call import MessageReader
from serve.inference import request_options
from serve.telemetry.metrics import VersionMetrics
from tests.serving import make_plane
from tests.train.tasks.test_tasks import image_bytes
from train.bundle import Predictor

MAX_BYTES = 100_000
IMAGES = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1)).astype(np.uint8)
MESSAGES_OF_KSERVE = {"RepositoryModelLoadResponse", "RepositoryModelUnloadResponse"}


class Plane:
    """A plane whose `predict` is a function that the test supplies."""

    version = "3"

    def __init__(self, manifest, predict):
        self.manifest, self.predict = manifest, predict
        self.metrics = VersionMetrics()


class SomeKeys:
    """A key store that requires no key and rejects only the key "wrong"."""

    def check(self, authorization, now):
        if authorization == "Bearer wrong":
            raise Unauthorized("this key is not known.")


class Repository:
    """A stand-in for a model's host and repository, with planes by name; records its calls."""

    versions = ("3",)
    config = ServeConfig(limits={"max_rows": 64, "max_body_bytes": MAX_BYTES})

    def __init__(self, planes):
        self.planes, self.asked = planes, []
        self.guard = Guard(SomeKeys(), loopback=True)
        self.repository = self

    def live(self):
        return True

    def ready(self):
        return True

    def endpoint(self, name, version):
        if name not in self.planes or version not in (None, "3"):
            raise NotFound(f"model '{name}' is not served here.")
        return SimpleNamespace(plane=self.planes[name])

    async def infer(self, call, endpoint, decode, encode, timeout_s):
        plane, inference = endpoint.plane, decode()
        self.asked.append((inference.parameters, call.client, timeout_s))
        now = asyncio.get_running_loop().time()
        options = request_options.RequestOptions(now + 30, client=call.client)
        return encode(inference, await plane.predict(inference.columns, options), plane)

    async def index(self, key):
        return [
            {"name": name, "version": "3", "state": state, "reason": "", "default": True}
            for name, state in (("digits", "READY"), ("taxis", "UNAVAILABLE"))
        ]

    async def load(self, name, actor, *, allow_interface_change=False):
        self.asked.append(("load", name, allow_interface_change))

    async def unload(self, name, actor):
        self.asked.append(("unload", name))
        if name != "digits":
            raise NotFound(f"model '{name}' is not served here.")


@pytest.fixture(scope="module")
def loop():
    """An event loop in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def run(loop):
    return lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)


@pytest.fixture(scope="module")
def repository(bundle, run):
    async def make():
        return make_plane(bundle)

    return Repository({"digits": run(make())})


@pytest.fixture(scope="module")
def service(repository):
    return protocol.InferenceService(repository)


@pytest.fixture(scope="module")
def url(service, run):
    server, port = run(protocol.start_server(service, 0, max_message_bytes=2 * MAX_BYTES))
    yield f"127.0.0.1:{port}"
    run(server.stop(0))


@pytest.fixture(scope="module")
def client(url):
    with triton.InferenceServerClient(url) as client:
        yield client


@pytest.fixture(scope="module")
def call(url):
    """A function that calls a method with a message; returns response and trailing metadata."""
    with grpc.insecure_channel(url) as channel:

        def call(method, request, metadata=()):
            name = f"/{protocol.SERVICE}/{method}"
            parse = getattr(service_pb2, f"{method}Response").FromString
            data = request if isinstance(request, bytes) else request.SerializeToString()
            answer, done = channel.unary_unary(name, None, parse).with_call(
                data, timeout=30, metadata=metadata
            )
            return answer, dict(done.trailing_metadata())

        yield call


@pytest.fixture(scope="module")
def expected(bundle):
    return Predictor.load(bundle).predict([{"image": image} for image in IMAGES])


@pytest.fixture
def serving(repository, bundle):
    """A function that serves a model "other" with the `predict` of a test."""

    def serving(predict):
        repository.planes["other"] = Plane(bundle.manifest, predict)

    yield serving
    del repository.planes["other"]


def raw_input(values=IMAGES, name="image", datatype="UINT8", shape=None):
    tensor = triton.InferInput(name, list(values.shape if shape is None else shape), datatype)
    return tensor.set_data_from_numpy(values) if shape is None else tensor


def typed(field="uint_contents", values=None, **changes):
    """Return a request of tritonclient whose tensor has typed contents."""
    values = IMAGES.ravel().tolist() if values is None else values
    tensor = {"name": "image", "datatype": "UINT8", "shape": IMAGES.shape, **changes}
    return service_pb2.ModelInferRequest(
        model_name="digits", inputs=[{**tensor, "contents": {field: values}}]
    )


def test_messages_have_the_same_fields_as_tritonclients():
    seen, waiting = set(), [getattr(messages.types, name).DESCRIPTOR for name in names()]
    while waiting:
        ours = waiting.pop()
        seen.add(ours.full_name)
        theirs = their_message(ours)
        for field in ours.fields:
            if ours.name not in MESSAGES_OF_KSERVE:
                assert described(field) == described(theirs.fields_by_name[field.name])
        assert set(choices(ours)) <= set(choices(theirs))
        waiting += ours.nested_types
        assert ours.GetOptions().map_entry == theirs.GetOptions().map_entry
    assert len(seen) > len(names())


def names():
    return list(vars(messages.types))


def their_message(ours):
    modules = (service_pb2, model_config_pb2)
    files = [module.DESCRIPTOR.message_types_by_name for module in modules]
    first, *nested = ours.full_name.removeprefix("inference.").split(".")
    message = next(file[first] for file in files if first in file)
    for name in nested:
        message = message.nested_types_by_name[name]
    return message


def described(field):
    kind = field.message_type and field.message_type.full_name
    return field.name, field.number, field.type, field.is_repeated, kind


def choices(message):
    return [(choice.name, field.name) for choice in message.oneofs for field in choice.fields]


def test_enums_have_the_same_numbers_as_tritonclients():
    config = messages.types.ModelQueuePolicy.DESCRIPTOR.fields_by_name["timeout_action"]
    assert config.type == FieldDescriptor.TYPE_ENUM
    theirs = [*model_config_pb2.DataType.items()]
    theirs += model_config_pb2.ModelQueuePolicy.TimeoutAction.items()
    for enum in messages.types.ModelConfig.DESCRIPTOR.file.enum_types_by_name.values():
        for value in enum.values:
            assert (value.name, value.number) in theirs


def test_the_descriptors_are_compiled_from_the_proto(tmp_path):
    folder, compiled = messages.DESCRIPTORS.parent, tmp_path / "compiled"
    arguments = [f"--proto_path={folder}", f"--descriptor_set_out={compiled}", "inference.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(messages.DESCRIPTORS.read_bytes()) == read(compiled.read_bytes())


def test_the_proto_names_the_methods_that_are_served():
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(messages.DESCRIPTORS.read_bytes())
    (declared,) = descriptors.file[0].service
    assert f"{messages.PACKAGE}.{declared.name}" == protocol.SERVICE
    assert [method.name for method in declared.method] == protocol.METHODS


def test_metadata_of_the_server_and_its_model_is_returned(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "3")
    assert client.get_server_metadata().name == "halyard"
    metadata = client.get_model_metadata("digits", as_json=True)
    assert metadata["versions"] == ["3"]
    image = {"name": "image", "datatype": "UINT8", "shape": ["-1", "8", "8", "1"]}
    assert metadata["inputs"] == [image]
    assert [output["name"] for output in metadata["outputs"]] == ["label", "probabilities"]
    config = client.get_model_config("digits").config
    assert (config.max_batch_size, config.input[0].data_type) == (64, model_config_pb2.TYPE_UINT8)


def test_raw_tensors_give_the_predictors_results(client, expected):
    answer = client.infer("digits", [raw_input()], request_id="q")
    assert answer.get_response().id == "q"
    assert [label.decode() for label in answer.as_numpy("label")] == expected["label"].tolist()
    np.testing.assert_allclose(
        answer.as_numpy("probabilities"), expected["probabilities"], atol=1e-5
    )


def test_a_png_gives_the_same_result_as_its_pixels(client, expected):
    files = np.array([image_bytes(image.squeeze()) for image in IMAGES], object)
    answer = client.infer("digits", [raw_input(files, datatype="BYTES")])
    assert [label.decode() for label in answer.as_numpy("label")] == expected["label"].tolist()


def test_typed_tensors_get_typed_outputs(call, expected):
    answer, _ = call("ModelInfer", typed())
    label, probabilities = answer.outputs
    assert not answer.raw_output_contents
    assert [value.decode() for value in label.contents.bytes_contents] == expected["label"].tolist()
    np.testing.assert_allclose(
        np.reshape(probabilities.contents.fp32_contents, probabilities.shape),
        expected["probabilities"],
        atol=1e-5,
    )


def test_the_response_has_the_requested_outputs(client):
    answer = client.infer("digits", [raw_input()], outputs=[triton.InferRequestedOutput("label")])
    assert [output.name for output in answer.get_response().outputs] == ["label"]


def test_parameters_client_and_deadline_reach_the_repository(client, repository):
    own = {"text": "a", "flag": True, "real": 0.5}
    client.infer(
        "digits",
        [raw_input()],
        priority=2,
        timeout=5_000_000,
        client_timeout=20,
        headers={"x-client-id": "me"},
        parameters=own,
    )
    given, name, timeout_s = repository.asked[-1]
    assert given == {"priority": 2, "timeout": 5_000_000, **own}
    assert name == "me"
    assert 10 < timeout_s < 25


def test_a_call_without_a_deadline_has_none(client, repository):
    client.infer("digits", [raw_input()])
    assert repository.asked[-1] == ({}, "", None)


def test_the_request_id_is_returned(call):
    for request in (typed(), typed(name="picture")):
        try:
            _, trailing = call("ModelInfer", request, [("x-request-id", "a1")])
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata())
        assert trailing["x-request-id"] == "a1"


@pytest.mark.parametrize(
    ("datatype", "field"), [pair for pair in messages.CONTENTS.items() if pair[0] != "BYTES"]
)
def test_typed_contents_of_each_datatype_keep_their_values(datatype, field):
    dtype = messages.DTYPES[datatype]
    lowest, highest = (0, 1)
    if dtype.kind in "iu":
        lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    values = np.array([[lowest, highest], [highest, lowest]], dtype)
    contents = messages.types.InferTensorContents(**{field: values.ravel().tolist()})
    decoded = messages._from_contents(contents, datatype, "input", [2, 2])
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, values)


def request(raw=None, **changes):
    """Return a request with `raw` data for each tensor, or with typed contents if it is None."""
    if raw is None:
        return typed(**changes)
    message = typed(**changes)
    message.inputs[0].ClearField("contents")
    message.raw_input_contents.extend(raw)
    return message


def two_inputs():
    message = typed()
    message.inputs.append(message.inputs[0])
    return message


def with_output(name, **parameters):
    message = typed()
    message.outputs.add(name=name)
    for key, value in parameters.items():
        message.outputs[0].parameters[key].string_param = value
    return message


def both_forms():
    message = typed()
    message.raw_input_contents.append(IMAGES.tobytes())
    return message


INVALID = {
    "no inputs": service_pb2.ModelInferRequest(model_name="digits"),
    "wrong name": typed(name="picture"),
    "the same input twice": two_inputs(),
    "unknown datatype": typed(datatype="INT7"),
    "a datatype without contents": typed(datatype="FP16"),
    "contents of another datatype": typed("fp32_contents"),
    "no contents": typed(values=[]),
    "one value too few": typed(values=[0] * (IMAGES.size - 1)),
    "a value out of range": typed(values=[256] * IMAGES.size),
    "a value below the range": typed("int_contents", [-129] * IMAGES.size, datatype="INT8"),
    "negative shape": typed(shape=[-1, 8, 8, 1]),
    "no shape": typed(shape=[]),
    "shape too deep": typed(shape=[1] * 100),
    "raw data too short": request([IMAGES.tobytes()[:-1]]),
    "raw data for two inputs": request([IMAGES.tobytes()] * 2),
    "raw and typed": both_forms(),
    "unknown output": with_output("x"),
    "shared memory": with_output("label", shared_memory_region="r"),
    "classification": with_output("label", classification="3"),
    "no message": b"\xff",
    "text that is not UTF-8": b"\x0a\x01\xff",
}


@pytest.mark.parametrize("case", INVALID)
def test_a_malformed_request_is_an_invalid_argument(case, call):
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", INVALID[case])
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in caught.value.details()


def test_a_long_name_leaves_room_for_the_message(call):
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", typed(name="é" * 20_000, datatype="INT7"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_large_shape_without_data_allocates_no_memory(bundle):
    message = messages.types.ModelInferRequest.FromString(
        typed(values=[0], shape=[1, 2**15, 2**15, 1]).SerializeToString()
    )
    tracemalloc.start()
    with pytest.raises(BadRequest, match="1 values"):
        messages.decode(message, bundle.manifest, 64)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("model", "version", "rows", "code"),
    [
        ("nothing", "", 1, "NOT_FOUND"),
        ("digits", "9", 1, "NOT_FOUND"),
        ("digits", "", 65, "RESOURCE_EXHAUSTED"),
        ("digits", "", MAX_BYTES // 64 + 1, "RESOURCE_EXHAUSTED"),
    ],
)
def test_unknown_models_and_too_many_rows_have_their_codes(client, model, version, rows, code):
    images = np.zeros((rows, 8, 8, 1), np.uint8)
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [raw_input(images)], model_version=version)
    assert caught.value.status() == f"StatusCode.{code}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("no"), "INVALID_ARGUMENT"),
        (Unauthorized("no"), "UNAUTHENTICATED"),
        (Forbidden("no"), "PERMISSION_DENIED"),
        (NotFound("no"), "NOT_FOUND"),
        (PayloadTooLarge("no"), "RESOURCE_EXHAUSTED"),
        (RateLimited("no", 7), "RESOURCE_EXHAUSTED"),
        (ClientDisconnected("no"), "CANCELLED"),
        (Overloaded("no", 7), "UNAVAILABLE"),
        (DeadlineExceeded("no", 7), "DEADLINE_EXCEEDED"),
        (RequestError("no"), "INTERNAL"),
    ],
)
def test_each_error_has_its_code_and_retry_after(error, code, call, serving):
    async def predict(columns, terms):
        raise error

    serving(predict)
    message = typed()
    message.model_name = "other"
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", message)
    assert (caught.value.code().name, caught.value.details()) == (code, "no")
    later = error.headers.get("Retry-After")
    assert dict(caught.value.trailing_metadata()).get("retry-after") == later


def test_an_engine_failure_reveals_no_details(client, serving, caplog):
    async def predict(columns, terms):
        raise RuntimeError("secret path")

    serving(predict)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("other", [raw_input()])
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert "secret" not in str(caught.value)
    assert "secret path" in caplog.text


def test_a_client_that_gives_up_ends_its_request(client, serving, repository):
    ended = threading.Event()

    async def predict(columns, terms):
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    serving(predict)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("other", [raw_input()], client_timeout=0.2)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert ended.wait(10)
    assert 0 < repository.asked[-1][2] < 0.3


def test_models_are_listed_loaded_and_unloaded(client, repository):
    index = client.get_model_repository_index().models
    assert [(model.name, model.state) for model in index] == [
        ("digits", "READY"),
        ("taxis", "UNAVAILABLE"),
    ]
    client.load_model("digits")
    client.unload_model("digits")
    assert repository.asked[-2:] == [("load", "digits", False), ("unload", "digits")]
    assert protocol.ACCESS["RepositoryModelLoad"] == Access.ADMIN
    assert protocol.ACCESS["RepositoryModelUnload"] == Access.ADMIN
    with pytest.raises(InferenceServerException, match="not served"):
        client.unload_model("taxis")
    with pytest.raises(InferenceServerException, match="unknown parameters"):
        client.load_model("digits", config="{}")


def test_only_health_is_available_with_a_wrong_key(client):
    headers = {"authorization": "Bearer wrong"}
    assert client.is_server_live(headers)
    assert client.is_server_ready(headers)
    for refused in (
        lambda: client.get_server_metadata(headers),
        lambda: client.get_model_metadata("digits", headers=headers),
        lambda: client.is_model_ready("digits", headers=headers),
        lambda: client.get_model_repository_index(headers),
        lambda: client.get_inference_statistics("digits", headers=headers),
        lambda: client.load_model("digits", headers),
        lambda: client.unload_model("digits", headers),
        lambda: client.infer("digits", [raw_input()], headers=headers),
    ):
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            refused()


def test_a_wrong_key_is_refused_before_the_message_is_sent(url):
    never = threading.Event()

    def messages():
        never.wait(30)
        yield b""

    with grpc.insecure_channel(url) as channel:
        ask = channel.stream_unary(f"/{protocol.SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            ask(messages(), timeout=20, metadata=[("authorization", "Bearer wrong")])
        never.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_call_without_a_message_is_refused(url):
    with grpc.insecure_channel(url) as channel:
        ask = channel.stream_unary(f"/{protocol.SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            ask(iter(()), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in caught.value.details()


class Arriving:
    """A call's context that counts messages that are arriving, now and at most."""

    def __init__(self):
        self.now = self.most = 0
        self.done = asyncio.Event()

    async def read(self):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.done.wait()
        finally:
            self.now -= 1
        return b"message"


def test_messages_that_arrive_at_the_same_time_are_limited(run):
    async def ask():
        reader = MessageReader(10, 80, 30)
        one, two = Arriving(), Arriving()
        calls = [
            asyncio.create_task(reader.read(SimpleNamespace(address=peer), context))
            for _ in range(20)
            for peer, context in (("ipv4:10.0.0.1:5", one), ("10.0.0.2", two))
        ]
        await asyncio.sleep(0)
        while one.now + two.now < 8:
            await asyncio.sleep(0)
        one.done.set()
        two.done.set()
        assert set(await asyncio.gather(*calls)) == {b"message"}
        return one.most, two.most

    assert run(ask()) == (4, 4)


def test_a_message_has_to_arrive_in_time(run):
    async def ask():
        reader = MessageReader(10, 80, 0.01)
        await reader.read(SimpleNamespace(address="10.0.0.1"), Arriving())

    with pytest.raises(RequestTimeout, match=r"did not arrive within 0\.01 s"):
        run(ask())


def test_calls_are_counted_with_their_model(client, repository, service):
    metrics = repository.planes["digits"].metrics
    before, failed = metrics.requests["grpc", 200], service.recorder.metrics.refused["not_found"]
    client.infer("digits", [raw_input()])
    with pytest.raises(InferenceServerException):
        client.infer("nothing", [raw_input()])
    assert metrics.requests["grpc", 200] == before + 1
    assert service.recorder.metrics.refused["not_found"] == failed + 1
    counted = client.get_inference_statistics("digits").model_stats[0].inference_stats
    assert counted.success.count >= before + 1


def test_concurrent_calls_get_their_own_responses(client, bundle):
    predictor = Predictor.load(bundle)
    batches = [IMAGES[: 1 + index % 5] for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda images: client.infer("digits", [raw_input(images)]), batches)
        for images, answer in zip(batches, answers, strict=True):
            expected = predictor.predict([{"image": image} for image in images])
            np.testing.assert_allclose(
                answer.as_numpy("probabilities"), expected["probabilities"], atol=1e-5
            )


def on_rays_server(run, add):
    """Start Ray Serve's gRPC server; return it, its address and a list of calls that Ray routes."""
    routed = []

    def factory(service_method, streaming_type):
        async def handler(request, context):
            routed.append((service_method, request))
            return b""

        return handler

    async def begin():
        server = gRPCGenericServer(factory, extra_options=[])
        add(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"

    return *run(begin()), routed


@pytest.mark.parametrize("here", [True, False])
def test_rays_server_answers_directly_if_the_model_is_local(here, run, service, monkeypatch):
    monkeypatch.setattr(protocol, "local", service if here else None)
    server, url, routed = on_rays_server(
        run, lambda server: protocol.add_to_server(SimpleMock(), server)
    )
    with triton.InferenceServerClient(url) as client:
        live = client.is_server_live()
    run(server.stop(0))
    assert live == here
    assert routed == ([] if here else [("/inference.GRPCInferenceService/ServerLive", b"")])


class SimpleMock:
    """A stand-in for the servicer that Ray passes, which has every attribute."""

    def __getattr__(self, name):
        return lambda request, context: None


def test_a_deployment_answers_calls_from_rays_proxy(run, service, monkeypatch, expected):
    @protocol.answers_grpc
    class Model:
        pass

    monkeypatch.setattr(protocol, "local", service)
    nothing = SimpleNamespace(
        auth_context=dict,
        code=lambda: None,
        details=lambda: "",
        invocation_metadata=lambda: [("x-request-id", "a1")],
        peer=str,
        peer_identities=list,
        peer_identity_key=str,
        trailing_metadata=list,
    )
    context = RayServegRPCContext(nothing)
    answer = run(Model().ModelInfer(typed().SerializeToString(), grpc_context=context))
    labels = answer.outputs[0].contents.bytes_contents
    assert [label.decode() for label in labels] == expected["label"].tolist()
    assert context.code() is None
    empty = run(Model().ModelInfer(b"\xff", grpc_context=context))
    assert empty.SerializeToString() == b""
    assert context.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert ("x-request-id", "a1") in context.trailing_metadata()
