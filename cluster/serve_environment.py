"""The ingress: HAProxy in front of the replicas where it runs, else Ray Serve's own proxy."""

import os
import sys
from pathlib import Path

from cluster import auth, connect, private, ray_address
from cluster.ingress import haproxy_config

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
HAPROXY_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
PYTHON = "HALYARD_PYTHON"
WRAPPER = Path(haproxy_config.__file__).with_name("haproxy")


# Read by Ray Serve when it starts. A cluster that already runs needs them in its own environment,
# on the head and on every worker.
ENVIRONMENT = {
    HAPROXY: "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.http.gateway:middlewares",
    # Else a Python process reads a line for each request; replicas count them already.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Of a message; one option is the limit of requests, and is checked once a message is here.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(64 * 2**20),
    # A prediction may be asked for twice: what a dying replica leaves unanswered, another answers.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Once, as what ended one replica may end another.
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    # An HAProxy that is stopping keeps a connection for 120 s, until its client asks again; then
    # that request is under way.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "180",
    # For bodies that the gateway of several models passes on, whose size is limited where they
    # arrive. Ray's limit is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # HAProxy can send a request of up to 64 KB, the size of many photographs, to another replica.
    # A connection has at most three such buffers, so 4,096 connections have 768 MiB.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 2**10),
    # More threads than cores pass connections to each other; four is what Ray has.
    "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
    # Ray has 0.1: the controller then takes a hundredth of what replicas do on two cores.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # A replica that is gone is noticed within a second.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",
    # So is an HAProxy; three checks must fail, and Ray has 10 s between them.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Where its cores are taken, a machine takes longer than Ray's 5 s to start a proxy. One that
    # has died fails its checks at once, whatever their limit.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
    # Of a client that neither sends nor takes; Ray has an hour.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",
}


def local_paths() -> dict[str, str]:
    """What Ray Serve needs besides ENVIRONMENT, with paths of this machine.

    HAProxy's files are in a folder of this user: whoever reaches its administration can send
    requests elsewhere.
    """
    folder = private.private_root() / "haproxy"
    return {
        HAPROXY_BINARY: str(WRAPPER),
        PYTHON: sys.executable,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def variable_names() -> list[str]:
    """All variables that a node which serves is started with."""
    return [*connect.ENVIRONMENT, *ENVIRONMENT, *local_paths()]


def set_serve_environment() -> None:
    """Set what is not set already; fall back to Ray's own proxy, saying so, without HAProxy."""
    connect.set_ray_environment()
    # A HAProxy of the user's own is the one that ours runs.
    given = os.environ.get(HAPROXY_BINARY)
    if given and Path(given) != WRAPPER:
        os.environ.setdefault(haproxy_config.BINARY, given)
        os.environ[HAPROXY_BINARY] = str(WRAPPER)
    if HAPROXY not in os.environ and (problem := haproxy_config.haproxy_problem()):
        print(f"HAProxy does not run here ({problem}); using Ray's own proxy.", file=sys.stderr)
        os.environ[HAPROXY] = "0"
    for name, value in (ENVIRONMENT | local_paths()).items():
        os.environ.setdefault(name, value)


def prepare_local_serving() -> None:
    """Set what is not set already, and make what a Ray that starts on this machine needs.

    Raises UserError, Failed.
    """
    set_serve_environment()
    auth.ensure_token()
    private.private_folder("haproxy")
    ray_address.forget_ended()
