"""The configuration that HAProxy is started with, made of the one that Ray writes."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from ray.serve._private import haproxy_templates

from cluster import haproxy_config, serve_environment

TEMPLATE = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
ENVIRONMENT = {**os.environ, **serve_environment.local_paths()}


@pytest.fixture(autouse=True)
def _of_no_server(monkeypatch):
    for name in (haproxy_config.HOST, haproxy_config.LOG_TARGET):
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


def test_haproxy_listens_for_requests_only_and_admin_is_private():
    config = haproxy_config.restrict(RAYS)
    binds = re.findall(r"^\s*bind\s+(\S+)", config, re.M)
    assert binds == ["127.0.0.1:8000", "127.0.0.1:9000"]
    assert "mode 600 level admin" in config
    assert "stats enable" not in config
    assert config.count(f'set-header x-halyard-peer "{haproxy_config.proof_prefix()} %[src]"') == 2
    assert config.count("timeout http-request 10s") == 2


def test_haproxy_logs_only_where_an_operator_says(monkeypatch):
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
def test_haproxy_alone_listens_to_other_machines(monkeypatch, host, binds):
    monkeypatch.setenv(haproxy_config.HOST, host)
    config = haproxy_config.restrict(RAYS)
    assert re.findall(r"^\s*bind\s+(\S+)", config, re.M) == binds
    # On a cluster Serve itself has been told the address.
    given = haproxy_config.restrict(RAYS.replace("127.0.0.1:8000", "10.0.0.1:8000"))
    assert "bind 10.0.0.1:8000" in given


def test_names_of_applications_are_not_told():
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
def test_what_another_ray_would_open_is_refused(changed):
    with pytest.raises(ValueError, match=r"listener|sockets"):
        haproxy_config.restrict(changed)


def test_rays_template_has_the_lines_that_are_known():
    for known in (
        "acl routes path -i /-/routes",
        'string "{{ route_info.routes_message }}" if routes',
        "use_backend grpc_fallback_backend if is_list_applications",
        "log {{ config.log_target }} local0 info",
    ):
        assert known in TEMPLATE


def test_rays_template_has_the_sections_that_are_known():
    sections = re.findall(r"^(?:frontend|listen) \S+", TEMPLATE, re.M)
    assert sorted(sections) == sorted([*haproxy_config.SERVING, *haproxy_config.DROPPED])


def test_haproxy_has_a_private_socket_that_ray_finds(tmp_path):
    config = tmp_path / "node" / "haproxy.cfg"
    config.parent.mkdir(mode=0o755)
    socket = config.with_name("admin.sock")
    config.write_text(
        RAYS.replace("/tmp/x/admin.sock", str(socket))
        .replace("127.0.0.1:8000", f"unix@{tmp_path}/http")
        .replace("127.0.0.1:9000", f"unix@{tmp_path}/grpc")
    )
    arguments = [str(serve_environment.WRAPPER), "-db", "-f", str(config)]
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        while not socket.exists():
            assert process.poll() is None, process.stderr.read()
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
        # As Ray looks for it.
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        assert os.fsencode(config) in command
        assert b"haproxy" in command[0]
    finally:
        process.kill()
        process.wait()


def test_a_configuration_that_is_refused_starts_nothing(tmp_path):
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
