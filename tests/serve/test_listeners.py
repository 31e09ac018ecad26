"""A server that `serve run` has started: its sockets, their protection, and how it ends."""

import ipaddress
import os
import re
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import psutil
import pyarrow.parquet
import pytest

from cluster import private
from cluster.nodes import node_checks
from tests import load, server
from tests.serve.http.test_routes import ZEROS, v2_body

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Reserved for documentation (RFC 5737), so no other machine has this address.
OTHER = "198.51.100.7"
INSIDE = "/ray.serve.ASGIService/HandleRequest"


@pytest.fixture(scope="module")
def started(bundle, tmp_path_factory):
    """(process, log, storage) of a server with default options apart from storage and log."""
    storage = tmp_path_factory.mktemp("storage")
    log = storage / "serve.log"
    process = server.start(
        f"model={bundle.path}", f"storage={storage}", "log.sample_rate=1", log=log
    )
    yield process, log, storage
    if process.poll() is None:
        server.stop(process)


@contextmanager
def another_address():
    """Yield an address of this machine that is not a loopback address."""
    added = subprocess.run(
        ["ip", "address", "add", f"{OTHER}/32", "dev", "lo"], check=False, capture_output=True
    )
    if added.returncode == 0:
        try:
            yield OTHER
        finally:
            subprocess.run(["ip", "address", "del", f"{OTHER}/32", "dev", "lo"], check=True)
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect((OTHER, 9))  # sends nothing
        address = outward.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback:
        pytest.skip("this machine has no address besides loopback, and none may be added")
    yield address


def sockets(process):
    """Return (name, address, port) of TCP listeners and UDP sockets of a process tree."""
    found = []
    for each in [process, *process.children(recursive=True)]:
        try:
            connections = each.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            is_udp = connection.type == socket.SOCK_DGRAM and not connection.raddr
            if connection.status == psutil.CONN_LISTEN or is_udp:
                host = connection.laddr.ip.removeprefix("::ffff:")
                found.append((each.name(), host, connection.laddr.port))
    return found


def test_every_socket_is_on_loopback(started):
    server_process = psutil.Process(started[0].pid)

    def serves():
        """Return whether HAProxy listens; it is replaced when a replica starts or ends."""
        return {8000, 9000} <= {port for _, _, port in sockets(server_process)}

    load.wait_for(serves)
    found = sockets(server_process)
    assert len(found) > 20, found
    assert [each for each in found if not ipaddress.ip_address(each[1]).is_loopback] == []


def test_no_port_is_reachable_at_another_address(started):
    with another_address() as address:
        for name, _, port in sockets(psutil.Process(started[0].pid)):
            with socket.socket() as probing:
                probing.settimeout(5)
                assert probing.connect_ex((address, port)) != 0, (name, port)


def test_a_replica_runs_nothing_without_the_token(started):
    """Ray Serve's calls between deployments unpickle their messages."""
    ports = [each["port"] for each in node_checks.listeners() if each["process"] == "ServeReplica"]
    asked = 0
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(INSIDE)(b"", timeout=10)
            assert caught.value.code() in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.UNAVAILABLE,
            )
            asked += caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    # The port of the model and that of the repository.
    assert asked == 2


def test_haproxys_admin_socket_is_private_to_its_user(started):
    files = list((private.private_root() / "haproxy").rglob("admin.sock"))
    assert files
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for folder in {private.private_root(), *(private.private_root() / "haproxy").glob("*/..")}:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    token = Path.home() / ".ray" / "auth_token"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_pages_of_other_sites_change_nothing(started):
    unload = f"{server.URL}/v2/repository/models/digits/unload"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
    ):
        assert httpx.post(unload, headers=headers).status_code == 403
    assert httpx.get(f"{server.URL}/v2/health/ready").json() == {"ready": True}
    assert httpx.post(unload.replace("unload", "load")).status_code == 200


def test_the_last_line_of_the_start_names_the_served_model(started, bundle):
    lines = started[1].read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("serving ")]
    assert line == (
        f"serving digits version 1, variant {bundle.manifest.default_variant}, at {server.URL}; "
        f"API {server.URL}/docs, console {server.URL}/"
    )
    assert line == lines[-1]


def test_the_doctor_lists_listeners_and_their_protection(started):
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "doctor"],
        cwd=server.REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for process in ("raylet", "gcs_server", "haproxy", "ServeReplica", "ProxyActor"):
        (line,) = [line for line in done.stderr.splitlines() if f" {process} here " in line]
        assert re.search(r"127\.0\.0\.1:\d+.*\(this machine only\)", line)
    assert "token of Ray" in done.stderr


# Must be the last test, because it ends the server.
def test_sigterm_ends_the_server_after_writing_its_records(started):
    process, log, storage = started
    with httpx.Client() as client:
        for _ in range(5):
            answer = client.post(f"{server.URL}/v2/models/digits/infer", json=v2_body(ZEROS))
            assert answer.status_code == 200
    process.terminate()
    assert process.wait(server.STOP_S) == 0
    text = log.read_text()
    assert "SIGTERM received" not in text
    assert "Traceback" not in text
    files = list((storage / "requests" / "digits").glob("*.parquet"))
    assert sum(pyarrow.parquet.read_table(file).num_rows for file in files) == 5
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for lines in (storage / "audit").glob("*.jsonl"):
        assert stat.S_IMODE(lines.stat().st_mode) == 0o600
