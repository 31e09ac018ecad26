"""Real clients and a running server with two replicas: predictions, errors, time limits, faults.

kserve needs other versions of protobuf and pandas than this project, so its clients run in a
separate process with the Python that KSERVE_PYTHON names (`make test-all` creates one).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from serve.loadtest import ClosedLoad, LoadTarget, PoissonLoad, run_load
from serve.loadtest.target import infer_requests
from tests import server
from tests.serve.http.test_routes import ZEROS, v2_body
from tests.server import REPOSITORY
from tests.train.tasks.test_tasks import image_bytes
from train.bundle import Predictor, registry

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HTTP, GRPC = "127.0.0.1:8000", "127.0.0.1:9000"
KSERVE_PYTHON = os.environ.get("KSERVE_PYTHON")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def url(trained, storage_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    options = [
        f"storage={storage_path}",
        "replicas=2",
        "limits.body_timeout_s=2",
        "limits.timeout_s=20",
    ]
    with server.running(*options, "limits.max_body_bytes=1000000", log=log) as url:
        yield url


@pytest.fixture(scope="module")
def expected(bundle):
    return Predictor.load(bundle).predict([{"image": image} for image in IMAGES])


def tensor(module, images=IMAGES, **options):
    made = module.InferInput("image", list(images.shape), "UINT8")
    made.set_data_from_numpy(images, **options)
    return made


def same(answer, expected):
    labels = answer.as_numpy("label").tolist()
    labels = [label.decode() if isinstance(label, bytes) else label for label in labels]
    assert labels == expected["label"].tolist()
    np.testing.assert_allclose(
        answer.as_numpy("probabilities"), expected["probabilities"], atol=1e-5
    )


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_http_client_gets_the_predictors_results(url, expected, binary):
    client = triton_http.InferenceServerClient(HTTP)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.get_server_metadata()["name"] == "halyard"
    metadata = client.get_model_metadata("digits")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    assert client.get_model_config("digits")["max_batch_size"] == 1024
    assert client.get_inference_statistics("digits")["model_stats"][0]["name"] == "digits"
    outputs = [
        triton_http.InferRequestedOutput(name, binary_data=binary)
        for name in ("label", "probabilities")
    ]
    inputs = [tensor(triton_http, binary_data=binary)]
    answer = client.infer("digits", inputs, outputs=outputs, request_id="r1", priority=1)
    same(answer, expected)
    assert answer.get_response()["id"] == "r1"


def test_tritons_grpc_client_gets_the_predictors_results(url, expected):
    with triton_grpc.InferenceServerClient(GRPC) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.get_model_metadata("digits").inputs[0].datatype == "UINT8"
        same(client.infer("digits", [tensor(triton_grpc)]), expected)


@pytest.mark.parametrize(
    ("model", "version", "images", "word"),
    [
        ("other", "", IMAGES, "other"),
        ("digits", "77", IMAGES, "77"),
        ("..%2fdigits", "", IMAGES, "does not exist|not served"),
        ("digits", "", IMAGES[..., 0, 0], "image"),
        ("digits", "", np.zeros((2000, 8, 8, 1), np.uint8), "1024"),
    ],
)
def test_wrong_requests_are_explained_in_both_protocols(url, model, version, images, word):
    with pytest.raises(InferenceServerException, match=word):
        triton_http.InferenceServerClient(HTTP).infer(
            model, [tensor(triton_http, images)], model_version=version
        )
    with (
        triton_grpc.InferenceServerClient(GRPC) as client,
        pytest.raises(InferenceServerException, match=word),
    ):
        client.infer(model.replace("%2f", "/"), [tensor(triton_grpc, images)], version)


def test_time_limits_are_kept_in_both_protocols(url):
    with pytest.raises(InferenceServerException, match=r"time|take"):
        triton_http.InferenceServerClient(HTTP).infer("digits", [tensor(triton_http)], timeout=1)
    with triton_grpc.InferenceServerClient(GRPC) as client:
        with pytest.raises(InferenceServerException, match=r"time|take"):
            client.infer("digits", [tensor(triton_grpc)], timeout=1)
        # The request needs some milliseconds, because gRPC's timers have a resolution of 1 ms.
        many = tensor(triton_grpc, np.resize(IMAGES, (1024, 8, 8, 1)))
        with pytest.raises(InferenceServerException, match=r"(?i)deadline|left"):
            client.infer("digits", [many], client_timeout=0.0005)


@pytest.mark.skipif(KSERVE_PYTHON is None, reason="KSERVE_PYTHON names no Python with kserve")
def test_kserves_clients_get_the_predictors_results(url, expected):
    done = subprocess.run(
        [KSERVE_PYTHON, "tests/kserve_client.py", url, GRPC, "digits", "image"],
        input=json.dumps(IMAGES.tolist()),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    labels = expected["label"].tolist()
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == {"ready": True, "rest": labels, "v1": labels, "grpc": labels}


def test_the_curl_commands_of_the_documentation_work(url, tmp_path):
    pages = [REPOSITORY / "docs" / name for name in ("guides/serve.md", "reference/http-api.md")]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    ]
    found = [re.findall(r"^curl.*?(?:\n(?=curl|$)|\Z)", block, re.S | re.M) for block in blocks]
    commands = [command for each in found for command in each if "digit.png" in command]
    (tmp_path / "digit.png").write_bytes(image_bytes(IMAGES[3].squeeze()))
    assert len(commands) >= 3
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert "error" not in answer, (command, answer)


def test_schemathesis_finds_no_server_error(url, tmp_path):
    command = [
        str(Path(sys.executable).with_name("st")),
        *("run", f"{url}/openapi.json", "--checks", "not_a_server_error"),
        # Exclude unloading, because an unloaded model rightly responds with 503.
        *("--max-examples", "40", "--exclude-path-regex", "unload", "--seed", "1"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def connect():
    return socket.create_connection(("127.0.0.1", 8000), timeout=30)


def answered(connection):
    """Return the status and body of a response, or None if the connection is closed instead."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            part = connection.recv(65_536)
        except ConnectionError:
            part = b""
        if not part:
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(65_536)
    return int(head.split()[1]), body


HEAD = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\n"


def test_a_body_of_a_gigabyte_is_refused_before_it_is_sent(url):
    with connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 1073741824\r\n\r\n" + b"x" * 1000)
        status, body = answered(connection)
    assert status == 413
    assert list(json.loads(body)) == ["error"]


def test_a_body_of_unknown_length_is_refused_once_it_is_too_long(url):
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    with connect() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with suppress(ConnectionError):
            while sent < 1000:
                connection.sendall(chunk)
                sent += 1
        assert sent < 1000
        result = answered(connection)
    assert result is None or result[0] == 413


def test_a_body_that_stops_arriving_times_out(url):
    with connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        began = time.monotonic()
        status, _ = answered(connection)
    assert status == 408
    assert 1 < time.monotonic() - began < 10


def test_a_half_closed_connection_does_no_harm(url):
    body = json.dumps(v2_body(ZEROS)).encode()
    with connect() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        result = answered(connection)
    # HAProxy treats a client that has closed its sending side as disconnected.
    assert result is None or result[0] in (200, 400)
    assert httpx.get(f"{url}/v2/health/ready").status_code == 200


def test_a_png_with_too_many_pixels_is_refused(url):
    bomb = image_bytes(np.zeros((5000, 5000), np.uint8))
    assert len(bomb) < 100_000
    response = httpx.post(
        f"{url}/v2/models/digits/infer",
        content=bomb,
        headers={"Inference-Header-Content-Length": "0"},
    )
    assert response.status_code == 400
    assert "pixels" in response.json()["error"]


def test_ray_serves_own_request_headers_have_no_effect(url):
    headers = {"x-request-timeout-seconds": "0.0001", "x-request-disconnect-disabled": "?1"}
    response = httpx.post(f"{url}/v2/models/digits/infer", json=v2_body(ZEROS), headers=headers)
    assert response.status_code == 200


class Requests(list):
    """Requests to send; `going` is set once a hundred have been sent."""

    def __init__(self, url):
        super().__init__(
            infer_requests(url, "digits", {}, num_requests=8, rows=1, seed=0, timeout_s=10)
        )
        self.going, self.sent = threading.Event(), 0

    def __getitem__(self, index):
        self.sent += 1
        if self.sent == 100:
            self.going.set()
        return super().__getitem__(index)


def load(url, kind, seconds, requests=None, **options):
    target = LoadTarget(url, requests or Requests(url))
    return run_load(target, kind, warmup_s=0.5, duration_s=seconds, **options)


def bad(report):
    return report.requests - report.ok


def test_unloading_and_loading_reach_every_replica(url):
    def statuses():
        with httpx.Client() as client:
            return {client.get(f"{url}/v2/models/digits/ready").status_code for _ in range(20)}

    assert httpx.post(f"{url}/v2/repository/models/digits/unload").status_code == 200
    assert statuses() == {503}
    assert httpx.post(f"{url}/v2/repository/models/digits/load", timeout=60).status_code == 200
    assert statuses() == {200}


def test_a_changed_alias_is_picked_up_without_a_failed_request(url, bundle, storage_path):
    client = registry.mlflow_client(str(storage_path))
    first = client.get_model_version_by_alias("digits", "production")
    second = client.create_model_version("digits", source=first.source, run_id=first.run_id)
    try:
        with ThreadPoolExecutor(1) as pool:
            requests = Requests(url)
            running = pool.submit(load, url, PoissonLoad(100), 5, requests)
            assert requests.going.wait(30)
            client.set_registered_model_alias("digits", "production", second.version)
            loaded = httpx.post(f"{url}/v2/repository/models/digits/load", timeout=60)
            assert loaded.json()["default"] == str(second.version)
            answer = httpx.post(f"{url}/v2/models/digits/infer", json=v2_body(ZEROS)).json()
            assert answer["model_version"] == str(second.version)
            assert bad(running.result()) == 0
    finally:
        client.set_registered_model_alias("digits", "production", first.version)
        client.delete_model_version("digits", second.version)
        httpx.post(f"{url}/v2/repository/models/digits/load", timeout=60)


def test_metrics_include_all_replicas(url):
    load(url, ClosedLoad(8), 1)

    def replicas():
        text = httpx.get(f"{url}/metrics").text
        counts = re.findall(r'halyard_rows_total{.*replica="(\w+)".*version="\d+"} (\S+)', text)
        return {name for name, rows in counts if float(rows) > 0}

    deadline = time.monotonic() + 15
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(replicas()) == 2


def test_a_killed_replica_fails_no_request_of_a_retrying_client(url):
    found = subprocess.run(
        ["pgrep", "-f", "ray::ServeReplica:default:digits"],
        capture_output=True,
        text=True,
        check=True,
    )
    victim = int(found.stdout.split()[0])
    with ThreadPoolExecutor(1) as pool:
        requests = Requests(url)
        running = pool.submit(load, url, ClosedLoad(8), 8, requests, retries=5, timeout_s=20)
        assert requests.going.wait(30)
        os.kill(victim, signal.SIGKILL)
        report = running.result()
    assert report.ok > 100
    assert bad(report) == 0
