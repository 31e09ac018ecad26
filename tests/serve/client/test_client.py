"""`serve.Client` against the REST application over a socket, and against a faulty server."""

import datetime
import decimal
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import Client, RequestFailed
from serve.client import codec
from serve.protocol import tensors
from tests.serve.test_access import SECRETS, make_keys
from tests.server import REPOSITORY
from tests.serving import listening, make_rest
from tests.train.tasks.test_tasks import image_bytes
from train.bundle import Predictor

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def url(bundle):
    with listening(make_rest(bundle)) as url:
        yield url


@pytest.fixture(scope="module")
def expected(bundle):
    return Predictor.load(bundle).predict([{"image": image} for image in IMAGES])


def assert_predictions(found, expected):
    assert [each["label"] for each in found] == list(expected["label"])
    probabilities = [list(each["probabilities"].values()) for each in found]
    np.testing.assert_allclose(probabilities, expected["probabilities"], atol=1e-6)


@pytest.mark.parametrize("batch_rows", [1, 3, 256])
def test_arrays_give_arrays_for_any_batch_size(url, expected, batch_rows):
    found = Client(url, batch_rows=batch_rows).predict({"image": IMAGES})
    assert list(found["label"]) == list(expected["label"])
    assert found["probabilities"].dtype == np.float32
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)


def test_a_model_with_one_input_accepts_a_plain_array(url, expected):
    assert list(Client(url).predict(IMAGES)["label"]) == list(expected["label"])


@pytest.mark.parametrize("batch_rows", [4, 256])
def test_records_give_a_dict_for_each(url, expected, batch_rows):
    client = Client(url, batch_rows=batch_rows)
    assert_predictions(client.predict([{"image": image} for image in IMAGES]), expected)
    assert_predictions(client.predict([image_bytes(image[..., 0]) for image in IMAGES]), expected)
    assert client.predict([IMAGES[0]])[0]["probabilities"].keys() == set("0123456789")


def test_a_frame_gives_a_frame_with_its_index(url, expected):
    index = [f"row {number}" for number in range(len(IMAGES))]
    frame = pd.DataFrame({"image": [image_bytes(image[..., 0]) for image in IMAGES]}, index=index)
    found = Client(url, batch_rows=3).predict(frame)
    assert list(found.index) == index
    assert list(found["label"]) == list(expected["label"])
    classes = [f"probabilities.{number}" for number in range(10)]
    np.testing.assert_allclose(found[classes], expected["probabilities"], atol=1e-6)


def test_an_array_of_files_is_sent_unchanged(url, expected):
    files = np.array([image_bytes(image[..., 0]) for image in IMAGES], object)
    assert list(Client(url).predict({"image": files})["label"]) == list(expected["label"])


def test_metadata_and_readiness_are_returned(url):
    client = Client(url)
    assert client.ready()
    assert client.models() == ["digits"]
    assert [tensor["name"] for tensor in client.metadata()["inputs"]] == ["image"]


def test_a_request_can_name_a_version(url):
    client = Client(url)
    arrays = client.predict(IMAGES[:1], version="production")
    records = client.predict([IMAGES[0]], version="production")
    assert [each["label"] for each in records] == list(arrays["label"])
    for records in (IMAGES[:1], [IMAGES[0]]):
        with pytest.raises(RequestFailed, match="99") as failed:
            client.predict(records, version="99")
        assert failed.value.status == 404


def test_a_refused_request_states_the_servers_reason(url):
    with pytest.raises(RequestFailed, match="field 'image'") as failed:
        Client(url).predict([{"image": b"no image"}])
    assert failed.value.status == 400


def test_without_a_server_the_error_is_one_line():
    client = Client("http://127.0.0.1:1", retries=1)
    with pytest.raises(RequestFailed, match=r"127\.0\.0\.1:1.*refused") as failed:
        client.models()
    assert failed.value.status is None
    assert not client.ready()


def test_a_key_is_sent_as_bearer_token(bundle):
    with listening(make_rest(bundle, keys=make_keys())) as url:
        name = next(iter(SECRETS))
        assert Client(url, api_key=SECRETS[name], model="digits").predict(IMAGES[:1])
        with pytest.raises(RequestFailed) as failed:
            Client(url, model="digits").predict(IMAGES[:1])
        assert failed.value.status == 401


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no records"),
        ("digit.png", "type str"),
        ({"image": IMAGES, "other": IMAGES[:2]}, "'image' 10, 'other' 2"),
        ({"image": 3}, "single value"),
        ({"image": IMAGES.astype(complex)}, "complex128"),
        ([{"image": object()}], "cannot be sent"),
        ({"image": np.array([object()])}, "'image'.*cannot be sent"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns of one name"),
    ],
)
def test_records_that_cannot_be_sent_are_named(url, records, words):
    with pytest.raises(ValueError, match=words):
        Client(url).predict(records)


def test_a_request_id_needs_a_single_request(url):
    with pytest.raises(ValueError, match="10 records are sent as 4"):
        Client(url, batch_rows=3).predict(IMAGES, request_id="order-1")


@pytest.mark.parametrize("options", [{"batch_rows": 0}, {"concurrency": 0}, {"timeout_s": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Client("http://127.0.0.1:8000", **options)


@contextmanager
def scripted(*responses):
    """Run a server that sends the given responses in order: (status, headers), or None to close the
    connection. Yield its URL and the list of received (path, headers, body)."""
    waiting, received = list(responses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, dict(self.headers), body))
            response = waiting.pop(0)
            if response is None:
                self.close_connection = True
                return
            status, headers = response
            content = json.dumps(
                {"predictions": [{"value": 1.5}]}
                if status == 200
                else {"error": f"status {status}"}
            ).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [429, 503])
def test_the_client_waits_for_retry_after(status):
    with scripted((status, {"Retry-After": "1"}), (200, {})) as (url, received):
        started = time.monotonic()
        assert Client(url, model="m").predict([{"a": 1}]) == [{"value": 1.5}]
        assert time.monotonic() - started >= 1
    assert len(received) == 2


def test_a_request_on_a_closed_connection_is_retried():
    with scripted(None, (200, {})) as (url, received):
        assert Client(url, model="m").predict([{"a": 1}]) == [{"value": 1.5}]
    assert len(received) == 2


def test_the_last_refusal_is_reported():
    with scripted(*[(503, {})] * 3) as (url, received):
        with pytest.raises(RequestFailed, match="status 503") as failed:
            Client(url, model="m", retries=2).predict([{"a": 1}])
        assert failed.value.status == 503
    assert len(received) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 504])
def test_other_failures_are_not_retried(status):
    with scripted((status, {})) as (url, received):
        with pytest.raises(RequestFailed) as failed:
            Client(url, model="m").predict([{"a": 1}])
        assert failed.value.status == status
    assert len(received) == 1


def test_the_time_limit_and_the_request_id_are_sent():
    with scripted((200, {})) as (url, received):
        Client(url, model="m", timeout_s=2.5).predict([{"a": 1}], request_id="order-1")
    path, headers, body = received[0]
    assert path == "/v1/models/m:predict"
    assert headers["X-Request-ID"] == "order-1"
    assert orjson.loads(body)["parameters"]["timeout"] == 2_500_000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (np.float32(0.5), 0.5),
        (np.int64(2**60), 2**60),
        (np.bool_(True), True),
        (pd.NA, None),
        (pd.NaT, None),
        (pd.Timestamp("2024-12-31 10:00"), "2024-12-31T10:00:00"),
        (datetime.date(2024, 12, 31), "2024-12-31"),
        (decimal.Decimal("12.50"), "12.50"),
        ({"b", "a"}, ["a", "b"]),
        (b"\x00\xff", {"b64": "AP8="}),
        (np.array(["a", None], object), ["a", None]),
        ("text", "text"),
    ],
)
def test_values_of_records_are_converted_to_json(value, expected):
    record = codec.wire_record({"a": value})
    assert orjson.loads(codec.to_json([record])) == [{"a": expected}]


def test_integers_of_pandas_stay_integers():
    frame = pd.DataFrame({"id": [2**60, 1], "x": [0.5, None], "when": [pd.NaT, pd.Timestamp(0)]})
    sent = orjson.loads(codec.to_json(codec.frame_records(frame)))
    assert sent[0] == {"id": 2**60, "x": 0.5, "when": None}
    assert sent[1]["x"] is None


CELLS = st.one_of(st.none(), st.text(), st.binary(min_size=1), st.booleans())


@given(st.lists(CELLS, min_size=1))
def test_mixed_columns_arrive_as_bytes(values):
    arrays, _ = codec.wire_columns({"a": np.array([*values, "x"], object)})
    header, raw = tensors.encode_raw("a", arrays["a"])
    size = header.pop("parameters")["binary_data_size"]
    assert size == len(raw)
    _, found = tensors.decode(header, memoryview(raw))
    words = {True: b"true", False: b"false", None: b""}
    expected = [words[each] if each is None or isinstance(each, bool) else each for each in values]
    plain = [each.encode() if isinstance(each, str) else each for each in expected]
    assert list(found[:-1]) == plain


@given(st.lists(st.one_of(st.none(), st.floats(), st.integers(-(2**53), 2**53)), min_size=1))
def test_columns_of_numbers_arrive_as_float64(values):
    arrays, count = codec.wire_columns({"a": np.array([*values, 1.5], object)})
    assert count == len(values) + 1
    assert arrays["a"].dtype == np.float64
    expected = [np.nan if each is None else float(each) for each in values]
    np.testing.assert_array_equal(arrays["a"][:-1], expected)


def test_numbers_beyond_float64_keep_their_digits():
    arrays, _ = codec.wire_columns({"a": np.array([2**53 + 1, None], object)})
    assert list(arrays["a"]) == [b"9007199254740993", b""]


def test_dates_are_sent_as_iso_8601():
    arrays, _ = codec.wire_columns({"a": np.array(["2024-12-31", "NaT"], "datetime64[D]")})
    assert list(arrays["a"]) == ["2024-12-31", b""]


def test_importing_the_client_starts_nothing():
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from serve import Client; Client('http://127.0.0.1:1')\n"
        "assert dict(os.environ) == before\n"
        "assert not {'ray', 'torch', 'pandas', 'mlflow'} & sys.modules.keys()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=dict(os.environ), check=True, timeout=60
    )
