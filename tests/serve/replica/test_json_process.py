"""A separate process decodes large JSON with the same results as the replica itself."""

import os
import signal

import numpy as np
import orjson
import psutil
import pytest

from serve.errors import BadRequest, Overloaded, PayloadTooLarge
from serve.protocol import v1, v2
from serve.replica.json_process import JSONProcess
from serve.replica.large_bodies import INLINE_BYTES
from tests.serving import client_of, make_rest
from train.bundle.manifest import TensorMetadata

LIMITS = {"max_rows": 64, "max_json_bytes": 2**24, "unknown_fields": "ignore"}


@pytest.fixture(scope="module")
def process():
    process = JSONProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def table(bundle):
    inputs = [
        TensorMetadata(name="age", datatype="FP64", shape=[-1]),
        TensorMetadata(name="photo", datatype="BYTES", shape=[-1]),
        TensorMetadata(name="words", datatype="BYTES", shape=[-1]),
    ]
    return bundle.manifest.model_copy(update={"inputs": inputs, "nullable": ["age"]})


def same(found, expected):
    assert vars(found).keys() == vars(expected).keys()
    for name, values in expected.columns.items():
        assert type(found.columns[name]) is type(values)
        if isinstance(values, np.ndarray):
            assert found.columns[name].dtype == values.dtype
        if isinstance(values, list):
            assert len(found.columns[name]) == len(values)
        for one, other in zip(found.columns[name], values, strict=True):
            np.testing.assert_array_equal(one, other)
    for name in ("id", "outputs", "binary", "parameters"):
        assert getattr(found, name) == getattr(expected, name)


def decode(process, protocol, body, manifest, header_length=None):
    return process.decode(protocol, body, manifest, header_length=header_length, **LIMITS)


def test_instances_are_decoded_the_same(process, bundle, table):
    images = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1)).tolist()
    body = orjson.dumps({"instances": images, "parameters": {"named": True}})
    same(decode(process, "v1", body, bundle.manifest), v1.decode(body, bundle.manifest, 64))
    records = [
        {"age": None, "photo": {"b64": "AAEC"}, "words": "größe"},
        {"age": 1.5, "photo": None, "words": ["a", "b"]},
        {"age": 2**60, "photo": "x", "words": True},
    ]
    body = orjson.dumps({"instances": records})
    same(decode(process, "v1", body, table), v1.decode(body, table, 64))


def test_tensors_are_decoded_the_same(process, bundle, table):
    pixels = np.arange(2 * 64, dtype=np.uint8)
    image = {"name": "image", "datatype": "UINT8", "shape": [2, 8, 8, 1]}
    body = orjson.dumps({"id": "q", "inputs": [{**image, "data": pixels.tolist()}]})
    same(decode(process, "v2", body, bundle.manifest), v2.decode(body, None, bundle.manifest, 64))
    head = orjson.dumps({"inputs": [{**image, "parameters": {"binary_data_size": 128}}]})
    body, length = head + pixels.tobytes(), str(len(head))
    found = decode(process, "v2", body, bundle.manifest, length)
    same(found, v2.decode(body, length, bundle.manifest, 64))
    tensors = [
        {"name": "age", "datatype": "FP64", "shape": [2], "data": [1.0, None]},
        {"name": "photo", "datatype": "BYTES", "shape": [2], "data": ["a", None]},
        {"name": "words", "datatype": "BYTES", "shape": [2, 1], "data": ["b", "ü"]},
    ]
    body = orjson.dumps({"inputs": tensors, "outputs": [{"name": "label"}]})
    same(decode(process, "v2", body, table), v2.decode(body, None, table, 64))


def test_errors_are_the_same(process, bundle):
    with pytest.raises(BadRequest, match="the body is not JSON"):
        decode(process, "v1", b"{", bundle.manifest)
    with pytest.raises(PayloadTooLarge, match="65 rows; at most 64"):
        decode(process, "v1", orjson.dumps({"instances": [0] * 65}), bundle.manifest)


def test_a_killed_process_is_replaced(process, bundle):
    body = orjson.dumps({"instances": np.zeros((1, 8, 8, 1), int).tolist()})
    decode(process, "v1", body, bundle.manifest)
    os.kill(process._process.pid, signal.SIGSTOP)
    child = psutil.Process(process._process.pid)
    child.kill()
    child.wait(10)
    assert decode(process, "v1", body, bundle.manifest).columns


def test_a_process_that_ends_early_raises_overloaded(bundle, monkeypatch):
    process = JSONProcess()
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(Overloaded, match="a large request could not be decoded"):
        decode(process, "v1", b"{}", bundle.manifest)
    assert process._process is None


def test_the_process_ends_with_its_replica(bundle):
    process = JSONProcess()
    with pytest.raises(BadRequest):
        decode(process, "v1", b"{}", bundle.manifest)
    child = psutil.Process(process._process.pid)
    assert child.nice() >= 10
    process._process.stdin.close()
    child.wait(10)


def test_large_and_small_requests_get_the_same_response(bundle):
    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1)).tolist()
    small = orjson.dumps({"instances": images})
    large = small + b" " * INLINE_BYTES
    rest = make_rest(bundle)
    with client_of(rest) as client:
        answers = [
            client.post("/v1/models/digits:predict", content=each) for each in (small, large)
        ]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
        assert rest._json_process._process.poll() is None
        wrong = client.post("/v2/models/digits/infer", content=b"[" * 2**19)
        assert wrong.status_code == 400
    rest._json_process.close()
