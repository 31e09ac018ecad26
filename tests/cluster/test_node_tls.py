"""A cluster whose nodes use TLS: traffic between them is encrypted; joining needs a certificate."""

import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tritonclient.grpc as triton_grpc

from cluster.local import lifecycle, network_namespace
from tests import server
from tests.authority import Authority
from tests.serve.http.test_routes import ZEROS
from tests.serve.test_clients import GRPC, tensor
from tests.server import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECRET = "read-by-nobody-on-the-way"
START_S = 120
ETH_P_ALL = 3

# A task on the other node that receives an object and returns another one.
ASK = f"""
from cluster import connect
connect.connect()
import ray
secret = {SECRET!r} * 20_000

@ray.remote(resources={{"node1": 0.1}}, num_cpus=0)
def double(given):
    return given + {SECRET!r} * len(given)

assert len(ray.get(double.remote(secret[:1000]))) > 20_000
assert len(ray.get(double.remote(ray.put(secret[:1000])))) > 20_000
print("answered")
"""


@pytest.fixture(scope="module")
def cluster():
    with lifecycle.running(2, 2, head_cpus=0, tls=True) as cluster:
        yield cluster


def run(code, environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


@contextmanager
def captured(cluster):
    """Collect the bytes that pass between the nodes while the block runs."""
    if not cluster.isolated:
        pytest.skip("nodes that share a network have no cable between them")
    taken, ended = bytearray(), threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as cable:
        cable.bind((network_namespace.BRIDGE, 0))
        cable.settimeout(0.2)

        def take():
            while not ended.is_set():
                try:
                    taken.extend(cable.recv(65536))
                except TimeoutError:
                    continue

        taking = threading.Thread(target=take)
        taking.start()
        try:
            yield taken
        finally:
            ended.set()
            taking.join()


def test_data_between_tasks_is_encrypted(cluster):
    with captured(cluster) as taken:
        done = run(ASK, cluster.client_environment)
    assert done.stdout == "answered\n", done.stderr
    assert len(taken) > 2 * 20_000
    assert SECRET.encode() not in taken


def test_joining_without_a_certificate_is_refused(cluster):
    environment = {
        name: value for name, value in cluster.client_environment.items() if "TLS" not in name
    }
    done = run("from cluster import connect; connect.connect()", environment)
    assert done.returncode != 0
    assert "no Ray responds without TLS (RAY_USE_TLS is not set)" in done.stderr.splitlines()[-1]


def test_a_server_certificate_that_nodes_lack_is_refused(cluster, bundle, tmp_path):
    cert, key = Authority(tmp_path).issue("server")
    options = [f"model={bundle.path}", f"storage={tmp_path}"]
    options += [f"security.tls_cert={cert}", f"security.tls_key={key}"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("serve")), "run", "serve.app", *options],
        cwd=REPOSITORY,
        env={**os.environ, **cluster.client_environment},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 2
    # Messages of Ray's processes may follow.
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: security.tls_cert is '{cert}', but Ray was started on ")
    assert "with none. Before it starts, run: source <(python -m serve.environment" in error


def test_requests_to_replicas_on_another_node_are_encrypted(cluster, bundle, tmp_path):
    options = [f"model={bundle.path}", f"storage={tmp_path}", "host=0.0.0.0"]
    environment = cluster.client_environment
    with server.running(*options, log=tmp_path / "log", environment=environment) as url:
        with captured(cluster) as taken:
            headers = {"X-Request-ID": SECRET, "Authorization": f"Bearer {SECRET}"}
            body = {"instances": ZEROS.tolist()}
            for _ in range(20):
                answer = httpx.post(
                    f"{url}/v1/models/digits:predict", headers=headers, json=body, trust_env=False
                )
                assert answer.status_code == 200
            with triton_grpc.InferenceServerClient(GRPC) as client:
                for _ in range(20):
                    answer = client.infer("digits", [tensor(triton_grpc)], request_id=SECRET)
                    assert answer.get_response().id == SECRET
        assert len(taken) > 40 * len(body)
        assert SECRET.encode() not in taken
