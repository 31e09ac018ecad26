"""Any input gets a prediction or a 4xx, never a 5xx, and memory does not grow."""

import asyncio
import json
import os
import tracemalloc
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from serve.errors import RequestError
from serve.grpc import messages
from serve.protocol import v1, v2
from tests.serve.http.test_routes import ZEROS, v2_body
from tests.serving import make_rest

# FUZZ_INPUTS=100000 makes more than 100,000 inputs in all.
INPUTS = int(os.environ.get("FUZZ_INPUTS", "4000"))
DATATYPES = ["UINT8", "BYTES", "FP32", "FP16", "INT64", "BOOL", "FP8", "", None, 7]
SIZES = [0, 1, 2, 8, 64, -1, 2**31, 2**63, 2**70, 1.5, "8", None, True]
JSONS = [None, True, -1, 1.5, 2**70, "", "é\udcff", [], [[]], {}, [None], ["x"], [[1], [2, 3]], 0]


def binary_request(images):
    """Return a valid request for images, uint8 [N, H, W, C]: its JSON and its binary data."""
    raw = images.tobytes()
    tensor = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raw)},
    }
    return {"inputs": [tensor], "parameters": {"binary_data_output": True}}, raw


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def spoilt(rng, request):
    """Return a copy of a request with one change."""
    request = json.loads(json.dumps(request))
    tensor = request["inputs"][0]
    match int(rng.integers(12)):
        case 0:
            tensor["datatype"] = pick(rng, DATATYPES)
        case 1:
            tensor["shape"] = [pick(rng, SIZES) for _ in range(int(rng.integers(6)))]
        case 2:
            tensor.setdefault("parameters", {})["binary_data_size"] = pick(rng, SIZES)
        case 3:
            tensor[pick(rng, list(tensor))] = pick(rng, JSONS)
        case 4:
            request[pick(rng, list(request))] = pick(rng, JSONS)
        case 5:
            del tensor[pick(rng, list(tensor))]
        case 6:
            request["inputs"] *= int(rng.integers(3))
        case 7:
            request["outputs"] = [{"name": pick(rng, ["label", "x", None, "probabilities"])}]
        case 8:
            request["outputs"] = pick(rng, JSONS)
        case 9:
            request["id"] = pick(rng, JSONS)
        case 10:
            request["parameters"] = {
                pick(rng, ["timeout", "priority", "binary_data_output"]): pick(rng, JSONS)
            }
        case 11:
            tensor["data"] = pick(rng, JSONS)
    return request


def scrambled(rng, body):
    """Return the body with some bytes changed, deleted or inserted, or with its end cut off."""
    data = bytearray(body)
    for _ in range(int(rng.integers(1, 6))):
        if not data:
            break
        at = int(rng.integers(len(data)))
        match int(rng.integers(4)):
            case 0:
                data[at] = int(rng.integers(256))
            case 1:
                del data[at : at + int(rng.integers(1, 40))]
            case 2:
                data[at:at] = rng.bytes(int(rng.integers(1, 20)))
            case 3:
                data = data[:at]
    return bytes(data)


def outcome(decode):
    """Return the RequestError that `decode` raises, or None. Any other error is a defect."""
    try:
        decode()
    except RequestError as error:
        return error
    return None


def bodies(rng, count):
    """Yield (body, header length) of malformed requests."""
    images = rng.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    good, raw = binary_request(images)
    plain = {**v2_body(images), "parameters": {}, "id": "a"}
    for index in range(count):
        if index % 3 == 2:
            yield json.dumps(spoilt(rng, plain)).encode(), None
            continue
        head = json.dumps(spoilt(rng, good) if index % 3 else good).encode()
        body = head + raw
        length = pick(rng, [len(head)] * 4 + [0, 1, len(body), len(body) + 1, 10**30])
        yield scrambled(rng, body) if index % 2 else body, str(length)


def test_the_codecs_decode_or_refuse_any_bytes_without_leaking(bundle, rng):
    manifest = bundle.manifest
    refused = answered = 0

    def run(count):
        nonlocal refused, answered
        for body, length in bodies(rng, count):
            for decode in (
                partial(v2.decode, body, length, manifest, 100),
                partial(v1.decode, body, manifest, 100),
            ):
                error = outcome(decode)
                assert error is None or (400 <= error.status < 500 and len(str(error)) < 1000)
                answered += error is None
                refused += error is not None

    run(500)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run(INPUTS)
    grown, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > INPUTS / 2
    assert answered > INPUTS / 20
    assert grown - before < 500_000
    assert peak - before < 5_000_000


def test_any_grpc_message_is_decoded_or_refused(bundle, rng):
    request = messages.types.ModelInferRequest(model_name="digits")
    request.inputs.add(name="image", datatype="UINT8", shape=[2, 8, 8, 1])
    request.raw_input_contents.append(bytes(128))
    good = request.SerializeToString()
    answered = 0
    for _ in range(INPUTS // 4):
        with suppress(DecodeError):
            message = messages.types.ModelInferRequest.FromString(scrambled(rng, good))
            error = outcome(partial(messages.decode, message, bundle.manifest, 100))
            answered += error is None
            assert error is None or 400 <= error.status < 500
    assert answered


def test_any_http_request_gets_a_status_below_500(bundle, rng):
    rest = make_rest(bundle, limits={"timeout_s": 20, "max_body_bytes": 100_000})
    statuses = {}

    async def ask(method, path, body, headers):
        sent = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if not parts:
                await asyncio.Event().wait()
            return parts.pop()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await rest(scope, receive, send)
        statuses[sent[0]["status"]] = statuses.get(sent[0]["status"], 0) + 1
        assert sent[0]["status"] < 500, (path, body[:300], sent[1]["body"])
        if sent[0]["status"] >= 400 and method != "HEAD":
            assert set(json.loads(sent[1]["body"])) == {"error"}

    async def scenario():
        good = json.dumps(v2_body(ZEROS)).encode()
        await ask("POST", "/v2/models/digits/infer", good, [])
        for body, length in bodies(rng, INPUTS // 4):
            headers = [] if length is None else [(v2.HEADER_LENGTH.encode(), length.encode())]
            await ask("POST", "/v2/models/digits/infer", body, headers)
        pieces = [
            "v2",
            "v1",
            "models",
            "digits",
            "..",
            "infer",
            "versions",
            "3",
            "\x00",
            "é",
            ":",
            "",
        ]
        for _ in range(INPUTS // 4):
            path = "/" + "/".join(pick(rng, pieces) for _ in range(int(rng.integers(7))))
            header = (pick(rng, [b"authorization", b"x-request-id", b"x-client-id"]), rng.bytes(30))
            await ask(pick(rng, ["GET", "POST", "PUT", "HEAD", "OPTIONS"]), path, b"", [header])

    asyncio.run(scenario())
    assert {200, 400, 404, 405} <= set(statuses)


@pytest.mark.parametrize("depth", [1_000, 10_000, 1_000_000])
@pytest.mark.parametrize("start", ["", '{"inputs":', '{"instances":'])
def test_nested_brackets_are_refused_at_once(bundle, depth, start):
    body = (start + "[" * depth + "]" * depth + ("}" if start else "")).encode()
    for decode in (
        partial(v2.decode, body, None, bundle.manifest, 10),
        partial(v1.decode, body, bundle.manifest, 10),
    ):
        assert outcome(decode).status == 400
