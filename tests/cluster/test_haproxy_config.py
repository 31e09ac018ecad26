"""The configuration that HAProxy starts with, derived from the one that Ray writes."""

import os
import re
import select
import socket
import stat
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from ray.serve._private import haproxy_templates

from cluster import serve_environment
from cluster.ingress import haproxy_config
from tests.serve.test_listeners import another_address

TEMPLATE = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
ENVIRONMENT = {**os.environ, **serve_environment.local_paths()}


@pytest.fixture(autouse=True)
def _of_no_server(monkeypatch):
    for name in (haproxy_config.HOST, haproxy_config.LOG_TARGET, haproxy_config.CONNECTIONS):
        monkeypatch.delenv(name, raising=False)


RAYS = """global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    mode http
    acl routes path -i /-/routes
    http-request set-log-level debug if routes
    http-request return status 200 content-type application/json string "{}" if routes
    acl is_http-default path_beg /
    use_backend http-default if is_http-default
frontend grpc_frontend
    bind 127.0.0.1:9000 proto h2
    acl is_list_applications path /ray.serve.RayServeAPIService/ListApplications
    use_backend grpc_fallback_backend if is_list_applications
    default_backend grpc-default
backend http-default
    mode http
backend grpc-default
    mode http
listen stats
  bind *:8404
  stats enable
"""


def listens(config):
    """Return the addresses at which other users can connect."""
    return re.findall(r"^\s*bind\s+(?!unix)(\S+)", config, re.M)


def test_haproxy_listens_for_requests_only_and_admin_is_private():
    config = haproxy_config.restrict(RAYS)
    assert listens(config) == ["127.0.0.1:8000", "127.0.0.1:9000"]
    assert "bind unix@/tmp/x/inner.sock mode 600\n" in config
    assert "mode 600 level admin" in config
    assert "stats enable" not in config
    assert config.count(f'set-header x-halyard-peer "{haproxy_config.proof_prefix()} %[src]"') == 2
    assert config.count("timeout http-request 10s") == 2


def test_haproxy_logs_only_to_a_configured_target(monkeypatch):
    assert "log 127.0.0.1" not in haproxy_config.restrict(RAYS)
    elsewhere = RAYS.replace("127.0.0.1:514", "stdout")
    monkeypatch.setenv(haproxy_config.LOG_TARGET, "stdout")
    assert "log stdout local0 info" in haproxy_config.restrict(elsewhere)


@pytest.mark.parametrize(
    ("host", "binds"),
    [
        ("0.0.0.0", ["0.0.0.0:8000", "0.0.0.0:9000"]),
        ("::", ["[::]:8000", "[::]:9000"]),
        ("127.0.0.1", ["127.0.0.1:8000", "127.0.0.1:9000"]),
    ],
)
def test_haproxy_listens_at_the_configured_address(monkeypatch, host, binds):
    monkeypatch.setenv(haproxy_config.HOST, host)
    config = haproxy_config.restrict(RAYS)
    assert listens(config) == binds
    # On a cluster, Ray Serve itself is configured with the address.
    given = haproxy_config.restrict(RAYS.replace("127.0.0.1:8000", "10.0.0.1:8000"))
    assert "bind 10.0.0.1:8000" in given


def test_replicas_are_reached_over_tls_but_rays_proxy_is_not():
    replicas = (
        "backend http-default\n    server r1 10.0.0.1:30000 check\n"
        "    server fallback 127.0.0.1:8500 check backup\n"
        "backend grpc-default\n    tcp-check connect\n"
        "    server r1 10.0.0.1:40000 proto h2 check\n"
    )
    config = haproxy_config.restrict(RAYS + replicas, replica_tls=lambda protocol: f" +{protocol}")
    assert "server r1 10.0.0.1:30000 check +http/1.1\n" in config
    assert "server fallback 127.0.0.1:8500 check backup\n" in config
    assert "tcp-check connect default\n" in config
    assert "server r1 10.0.0.1:40000 proto h2 check +h2\n" in config
    plain = haproxy_config.restrict(RAYS + replicas)
    assert "check\n" in plain
    assert "tcp-check connect\n" in plain


def test_names_of_applications_are_not_exposed():
    config = haproxy_config.restrict(RAYS)
    assert "/-/routes" not in config
    assert "if routes" not in config
    assert "use_backend grpc_fallback_backend" not in config
    assert 'grpc-message "not for clients" if is_list_applications' in config
    assert "use_backend http-default if is_http-default" in config


@pytest.mark.parametrize(
    "changed",
    [
        RAYS + "frontend new\n    bind *:1\n",
        RAYS.replace("frontend prometheus", "frontend renamed"),
        RAYS.replace("listen stats", "listen others"),
        RAYS.replace("mode 666", ""),
        RAYS.replace("stats socket", "stats unix"),
    ],
)
def test_unknown_listeners_and_sockets_of_ray_are_refused(changed):
    with pytest.raises(ValueError, match=r"listener|sockets"):
        haproxy_config.restrict(changed)


def test_rays_template_has_the_expected_lines():
    for known in (
        "acl routes path -i /-/routes",
        'string "{{ route_info.routes_message }}" if routes',
        "use_backend grpc_fallback_backend if is_list_applications",
        "log {{ config.log_target }} local0 info",
        "errorfile 502 {{ config.error_file_path }}",
        "errorfile 503 {{ config.error_file_path }}",
        "tune.bufsize {{ config.bufsize }}",
        "retries {{ config.retries }}",
        "    maxconn {{ config.maxconn }}\n",
        "    tcp-check connect\n",
        "    use_backend {{ backend.name or 'unknown' }} if is_{{ backend.name or 'unknown' }}\n",
        " observe layer4 error-limit {{ config.observe_error_limit }} on-error mark-down{%",
        "server {{ server.name }} {{ server.host }}:{{ server.port }} check{%",
        "server {{ server.name }} {{ server.host }}:{{ server.port }} proto h2 check{%",
        "{{ backend.fallback_server.port }} check backup",
        "{{ backend.fallback_server.port }} proto h2 check backup",
    ):
        assert known in TEMPLATE


def test_rays_template_has_the_expected_sections():
    sections = re.findall(r"^(?:frontend|listen) \S+", TEMPLATE, re.M)
    assert sorted(sections) == sorted([*haproxy_config.SERVING, *haproxy_config.DROPPED])


def test_haproxy_has_a_private_socket_that_ray_finds(tmp_path):
    config = tmp_path / "node" / "haproxy.cfg"
    config.parent.mkdir(mode=0o755)
    admin = config.with_name("admin.sock")
    config.write_text(
        RAYS.replace("/tmp/x/admin.sock", str(admin))
        .replace("127.0.0.1:8000", f"unix@{tmp_path}/http")
        .replace("127.0.0.1:9000", f"unix@{tmp_path}/grpc")
    )
    with running(config) as process:
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
        assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
        # Ray finds the process by these parts of its command line.
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        assert os.fsencode(config) in command
        assert b"haproxy" in command[0]


def test_without_a_replica_the_response_has_retry_after(tmp_path):
    config = tmp_path / "node" / "haproxy.cfg"
    config.parent.mkdir()
    (config.parent / "500.http").write_bytes(b"HTTP/1.1 500 Error\r\n\r\n")
    port, errors = free_port(), config.parent / "500.http"
    config.write_text(
        RAYS.replace("/tmp/x/admin.sock", str(config.with_name("admin.sock")))
        .replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        .replace("127.0.0.1:9000", f"unix@{tmp_path}/grpc")
        .replace(
            "defaults\n", f"defaults\n    errorfile 502 {errors}\n    errorfile 503 {errors}\n"
        )
    )
    with running(config):
        answer = httpx.post(f"http://127.0.0.1:{port}/v2/models/digits/infer", content=b"{}")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "send the request again" in answer.json()["error"]


def test_state_changes_and_feedback_are_not_retried():
    config = haproxy_config.restrict(RAYS)
    (pattern,) = set(re.findall(r"disable-l7-retry if { path_reg (\S+) }", config))
    for path in ("repository/models/digits/load", "repository/models/a-b/unload"):
        assert re.fullmatch(pattern, f"/v2/{path}")
    assert re.fullmatch(pattern, "/v2/models/digits/feedback")
    assert not re.fullmatch(pattern, "/v2/models/digits/infer")
    assert config.count("path_end /RepositoryModelLoad /RepositoryModelUnload") == 2


def test_the_grpc_port_accepts_grpc_calls_only():
    config = haproxy_config.restrict(RAYS)
    http, grpc = config.split("frontend grpc_frontend")
    assert "not a gRPC call" not in http
    (pattern,) = re.findall(r"url_reg (\S+) }", grpc)
    for good in ("/a.B/C", "https://localhost:9000/a.B/C", "http://[::1]/a"):
        assert re.match(pattern, good)
    for bad in ("", "*", "HTTPS://localhost/a.B/C", "\0://x/a", "https:///a", "ftp://x/a"):
        assert not re.match(pattern, bad)


def test_connections_of_one_client_address_are_limited(tmp_path, monkeypatch):
    monkeypatch.setenv(haproxy_config.CONNECTIONS, "8")
    config = tmp_path / "node" / "haproxy.cfg"
    config.parent.mkdir()
    port = free_port()
    config.write_text(
        RAYS.replace("/tmp/x/admin.sock", str(config.with_name("admin.sock")))
        .replace("127.0.0.1:8000", f"0.0.0.0:{port}")
        .replace("127.0.0.1:9000", f"unix@{tmp_path}/grpc")
        .replace("defaults\n", "defaults\n timeout connect 5s\n timeout client 60s\n")
    )
    with another_address() as address, running(config), ExitStack() as opened:
        theirs = [opened.enter_context(unfinished(address, port)) for _ in range(20)]
        await_closed(theirs, 12)
        # Connections from this machine are not limited.
        own = [opened.enter_context(unfinished("127.0.0.1", port)) for _ in range(20)]
        assert answers("127.0.0.1", port)
        assert not answers(address, port)
        assert len(closed(own)) == 0
        assert len(closed(theirs)) == 12
        for each in theirs:
            each.close()
        while not answers(address, port):
            time.sleep(0.01)


def test_the_body_timeout_can_be_configured(monkeypatch):
    assert "wait-for-body time 75000ms if { req.body_size gt 0 }" in haproxy_config.restrict(RAYS)
    monkeypatch.setenv(haproxy_config.BODY_TIMEOUT, "2.5")
    assert "wait-for-body time 2500ms if" in haproxy_config.restrict(RAYS)
    for wrong in ("", "soon", "inf", "nan", "0", "-1", "1e9"):
        monkeypatch.setenv(haproxy_config.BODY_TIMEOUT, wrong)
        with pytest.raises(ValueError, match="expected seconds"):
            haproxy_config.restrict(RAYS)


@pytest.mark.parametrize("given", ["", "-1", "many"])
def test_an_invalid_connection_limit_is_refused(monkeypatch, given):
    monkeypatch.setenv(haproxy_config.CONNECTIONS, given)
    with pytest.raises(ValueError, match="expected a whole number, 0 for no limit"):
        haproxy_config.restrict(RAYS)


def test_the_connection_limit_can_be_switched_off(monkeypatch):
    assert "sc0_conn_cur gt 512" in haproxy_config.restrict(RAYS)
    monkeypatch.setenv(haproxy_config.CONNECTIONS, "0")
    assert "conn_cur" not in haproxy_config.restrict(RAYS)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(config):
    """Run HAProxy with a configuration in the form that Ray writes."""
    admin = config.with_name("admin.sock")
    arguments = [str(serve_environment.WRAPPER), "-db", "-f", str(config)]
    environment = {**os.environ, **serve_environment.local_paths()}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE) as process:
        try:
            while not admin.exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def unfinished(address, port):
    """Return a connection with an incomplete request; if HAProxy refuses it, it is closed."""
    made = socket.socket()
    made.settimeout(10)
    with suppress(ConnectionError):
        made.connect((address, port))
        made.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
    return made


def closed(connections):
    """Return the connections that HAProxy has closed."""
    ended = []
    for each in select.select(connections, [], [], 0)[0]:
        try:
            if not each.recv(1, socket.MSG_PEEK):
                ended.append(each)
        except OSError:  # reset, perhaps before connect() returned
            ended.append(each)
    return ended


def await_closed(connections, count):
    deadline = time.monotonic() + 10
    while len(closed(connections)) < count:
        assert time.monotonic() < deadline, len(closed(connections))
        time.sleep(0.01)


def answers(address, port):
    with suppress(OSError), unfinished(address, port) as made:
        made.sendall(b"\r\n")
        return made.recv(12).startswith(b"HTTP/1.1 503")
    return False


def test_haproxy_does_not_start_with_a_refused_configuration(tmp_path):
    config = tmp_path / "haproxy.cfg"
    config.write_text(RAYS + "frontend new\n    bind *:1\n")
    done = subprocess.run(
        [str(serve_environment.WRAPPER), "-db", "-f", str(config)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "HAProxy is not started: unknown listener 'bind *:1' in 'frontend new'\n"
