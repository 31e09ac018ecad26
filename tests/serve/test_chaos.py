"""A model that is served on three nodes, each with an ingress, while processes and nodes fail.

Run with -s to see the figures of each test.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.local import lifecycle
from serve.loadtest import ClosedLoad, LoadTarget, PoissonLoad
from serve.loadtest.target import infer_requests
from tests import server
from tests.load import brief, failures, meanwhile, wait_for
from train.bundle import registry

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

REPLICA = "ray::ServeReplica:default:digits"
HAPROXY = "bin/haproxy -db"
# Other machines can reach these servers, so changes need a key.
KEY = "hk_of_these_tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Declare a node that does not respond dead after some seconds instead of half a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


@contextmanager
def serving(cluster, storage_path, log, replicas=3):
    """Serve replicas behind the ingress of every node; wait until all nodes are ready."""
    keys = log.with_name("keys.yaml")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(json.dumps([{"name": "tests", "sha256": digest, "admin": True}]))
    with server.running(
        *(f"storage={storage_path}", f"replicas={replicas}", "host=0.0.0.0"),
        f"security.api_keys_file={keys}",
        log=log,
        environment=cluster.client_environment,
    ):
        wait_for(lambda: all(ready(cluster, name) for name in cluster.names))
        yield


@pytest.fixture(scope="module")
def cluster(trained, storage_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with lifecycle.running(3, 2, environment=QUICK) as cluster:
        if not cluster.isolated:
            pytest.skip("needs permission for network namespaces")
        with serving(cluster, storage_path, log):
            yield cluster


def url(cluster, name):
    return f"http://{cluster.node_address(name)}:8000"


def ready(cluster, name):
    try:
        return httpx.get(f"{url(cluster, name)}/v2/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def target(cluster, name):
    """Return requests that go through a node's ingress."""
    place = url(cluster, name)
    requests = infer_requests(
        place, "digits", HEADERS, num_requests=64, rows=1, seed=0, timeout_s=10
    )
    return LoadTarget(place, requests)


def processes(cluster, words, name=None):
    """Return ids of processes on one node or on all, whose command line contains the words."""
    shown = subprocess.run(
        ["pgrep", "-f", words], capture_output=True, text=True, check=False
    ).stdout.split()
    return sorted(set(cluster.processes(name)) & {int(pid) for pid in shown})


def show(what, report, **figures):
    print(f"\n{what}: {json.dumps({**figures, **brief(report)})}")


def test_a_killed_replica_fails_no_request(cluster):
    before = processes(cluster, REPLICA)
    with meanwhile(
        target(cluster, "node1"), ClosedLoad(16), duration_s=20, timeout_s=20
    ) as reports:
        wait_for(lambda: answered(cluster) > 1000)
        os.kill(processes(cluster, REPLICA, "node2")[0], signal.SIGKILL)
        wait_for(lambda: len(processes(cluster, REPLICA)) == len(before) - 1)
        back_s = wait_for(lambda: serve_replicas(cluster) == 3)
    show("replica killed", reports[0], full_after_s=round(back_s, 1))
    assert failures(reports[0]) == 0


def answered(cluster):
    """Return the number of rows that all replicas have predicted so far."""
    text = httpx.get(f"{url(cluster, 'head')}/metrics", headers=HEADERS, timeout=5).text
    rows = [line.split()[-1] for line in text.splitlines() if line.startswith("halyard_rows_total")]
    return sum(map(float, rows))


def serve_replicas(cluster):
    """Return the number of running replicas according to Ray Serve."""
    shown = subprocess.run(
        [str(Path(sys.executable).with_name("serve")), "status"],
        env={**os.environ, **cluster.client_environment, "RAY_ADDRESS": cluster.dashboard},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    part = shown.partition("digits:")[2].partition("RUNNING:")[2].split()
    return int(part[0]) if part else 0


def test_a_killed_haproxy_fails_no_request_of_other_nodes(cluster):
    beside, own = target(cluster, "head"), target(cluster, "node1")
    with (
        meanwhile(beside, PoissonLoad(100), duration_s=20, timeout_s=20) as others,
        meanwhile(own, PoissonLoad(50), duration_s=20, timeout_s=20) as reports,
    ):
        before = answered(cluster)
        wait_for(lambda: answered(cluster) > before + 300)
        for pid in processes(cluster, HAPROXY, "node1"):
            os.kill(pid, signal.SIGKILL)
        back_s = wait_for(lambda: ready(cluster, "node1"))
    show("HAProxy killed, its clients", reports[0], back_after_s=round(back_s, 1))
    show("HAProxy killed, clients of another", others[0])
    assert failures(others[0]) == 0
    assert back_s < 15
    # Only refused connections, and client errors in the half second before it has any routes.
    assert reports[0].server_errors == reports[0].timeouts == 0


@pytest.mark.parametrize("way", ["killed", "cut off and killed"])
def test_other_nodes_take_over_for_a_lost_node(cluster, way):
    # A node with a replica. A node without one has no ingress either; clients use the head's.
    lost = "node2" if processes(cluster, REPLICA, "node2") else "node1"
    assert processes(cluster, REPLICA, lost)
    with meanwhile(target(cluster, "head"), ClosedLoad(16), duration_s=40, timeout_s=20) as reports:
        before = answered(cluster)
        wait_for(lambda: answered(cluster) > before + 1000)
        if way != "killed":
            # As after a power failure: peers do not learn that connections are closed.
            cluster.cut(lost)
        cluster.kill(lost)
        full_s = wait_for(lambda: len(processes(cluster, REPLICA)) == 3)
        wait_for(lambda: serve_replicas(cluster) == 3)
    show(f"node {way}", reports[0], full_after_s=round(full_s, 1))
    # Requests in progress on a node that is cut off fail only when they time out.
    assert failures(reports[0]) <= (0 if way == "killed" else 16)
    cluster.start(lost)
    wait_for(lambda: lost in cluster.alive())


def test_rolling_out_a_damaged_version_keeps_the_old_one(cluster, storage_path, tmp_path):
    client = registry.mlflow_client(str(storage_path))
    first = client.get_model_version_by_alias("digits", "production")
    location, _ = registry.resolve_model("models:/digits@production", str(storage_path))
    damaged = shutil.copytree(location, tmp_path / "damaged")
    for file in damaged.glob("variants/*/*.onnx"):
        file.write_bytes(file.read_bytes()[:-100])
    bad = client.create_model_version("digits", source=damaged.as_uri(), run_id=first.run_id)
    place = url(cluster, "head")
    try:
        with meanwhile(
            target(cluster, "head"), PoissonLoad(100), duration_s=10, timeout_s=20
        ) as reports:
            client.set_registered_model_alias("digits", "production", bad.version)
            loaded = httpx.post(
                f"{place}/v2/repository/models/digits/load", headers=HEADERS, timeout=60
            )
            after = httpx.get(f"{place}/v2/models/digits", headers=HEADERS).json()
    finally:
        client.set_registered_model_alias("digits", "production", first.version)
        client.delete_model_version("digits", bad.version)
    show("damaged version", reports[0], answer=loaded.json(), status=loaded.status_code)
    assert loaded.status_code >= 400
    assert "digest" in loaded.json()["error"]
    assert after["versions"] == [str(first.version)]
    assert failures(reports[0]) == 0
