"""The head of a cluster is killed and restarted with its state in Redis during serving."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import lifecycle
from serve.loadtest import ClosedLoad
from tests.load import failures, meanwhile, wait_for
from tests.serve.test_chaos import REPLICA, processes, ready, serve_replicas, show, target
from tests.server import REPOSITORY

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]


@pytest.fixture
def redis(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_no_request_fails_while_a_killed_gcs_restarts(trained, storage_path, redis):
    of_head = {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "halyard"}
    with lifecycle.running(3, 2, head_cpus=0, head_environment=of_head) as cluster:
        if not cluster.isolated:
            pytest.skip("needs permission for network namespaces")
        serve = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", "serve.app"]
        subprocess.run(
            [*serve, f"storage={storage_path}", "replicas=2", "host=0.0.0.0"],
            cwd=REPOSITORY,
            env={**os.environ, **cluster.client_environment},
            check=True,
            capture_output=True,
            timeout=120,
        )
        wait_for(lambda: ready(cluster, "node1"))
        before = processes(cluster, REPLICA)
        with meanwhile(
            target(cluster, "node1"), ClosedLoad(8), duration_s=60, timeout_s=20
        ) as reports:
            (gcs,) = processes(cluster, "gcs_server", "head")
            os.kill(gcs, signal.SIGKILL)
            # End the head's other processes too, as the end of its pod would.
            wait_for(lambda: not processes(cluster, "raylet/raylet", "head"))
            cluster.kill("head")
            cluster.start("head")
            back_s = wait_for(lambda: set(cluster.alive()) == set(cluster.names))
            wait_for(lambda: serve_replicas(cluster) == 2)
        show("GCS killed", reports[0], head_back_after_s=round(back_s, 1))
        assert processes(cluster, REPLICA) == before, "replicas must not be restarted"
        assert failures(reports[0]) == 0
