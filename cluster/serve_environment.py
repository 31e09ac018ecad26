"""Environment variables for Ray Serve, with HAProxy as its ingress if HAProxy can run here."""

import os
import sys
from pathlib import Path

from cluster import auth, connect, private, ray_address
from cluster.ingress import haproxy_config

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
HAPROXY_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
PYTHON = "HALYARD_PYTHON"
WRAPPER = Path(haproxy_config.__file__).with_name("haproxy")


# Ray Serve reads these when it starts. A running cluster must have been started with them, on the
# head and on every worker.
ENVIRONMENT = {
    HAPROXY: "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.http.gateway:middlewares",
    # If enabled, a Python process parses a log line for each request; replicas already count them.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Maximum size of a gRPC message; the option max_body_bytes is enforced after receipt.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(64 * 2**20),
    # If a replica dies before it responds, its requests are sent to another one. Predictions may
    # run twice.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Retry only once, because a request that killed one replica may kill the next.
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    # A stopping HAProxy keeps idle connections for 120 s, in case their clients send one more
    # request. The rest is time for that request.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "180",
    # The gateway of several models passes on bodies whose size it has already checked. Ray's
    # default limit is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # HAProxy can resend a request only if it fits its buffer: 64 KB holds many photographs. A
    # connection has at most three buffers, so 4,096 connections use at most 768 MiB.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 2**10),
    # Ray's default of 4, but no more threads than cores: they would only pass connections on.
    "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
    # At Ray's default of 0.1 s, the controller takes 1% of the replicas' work on two cores.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # A replica that has died is detected within a second.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",
    # An HAProxy that has died is detected after three failed checks; Ray's default is 10 s each.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # On a busy machine, a proxy takes longer to start than Ray's default of 5 s. A proxy that has
    # died fails its checks immediately, whatever the limit.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
    # Limit for a client that neither sends nor receives; Ray's default is an hour.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",
}


def local_paths() -> dict[str, str]:
    """Return the variables with paths on this machine, which Ray Serve needs besides ENVIRONMENT.

    HAProxy's files are in this user's private folder, because anyone who can reach its
    administration socket can redirect requests.
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
    """Return the names of all variables that a node needs for serving."""
    return [*connect.ENVIRONMENT, *ENVIRONMENT, *local_paths()]


def set_serve_environment() -> None:
    """Set the variables that are not set already.

    If HAProxy cannot run here, Ray's own proxy is used and a message is printed on stderr.
    """
    connect.set_ray_environment()
    # Run the user's own HAProxy, if one is named, through the wrapper. A process started by another
    # copy of Halyard inherits the name of that copy's wrapper, which is not an HAProxy.
    if given := os.environ.get(HAPROXY_BINARY):
        if not Path(given).with_name(Path(haproxy_config.__file__).name).is_file():
            os.environ.setdefault(haproxy_config.BINARY, given)
        os.environ[HAPROXY_BINARY] = str(WRAPPER)
    if HAPROXY not in os.environ and (problem := haproxy_config.haproxy_problem()):
        print(f"HAProxy cannot run here ({problem}); using Ray's own proxy.", file=sys.stderr)
        os.environ[HAPROXY] = "0"
    for name, value in (ENVIRONMENT | local_paths()).items():
        os.environ.setdefault(name, value)


def prepare_local_serving() -> None:
    """Prepare the environment, token and folder for a Ray that serves on this machine.

    Raises UserError if the token cannot be used, CommandFailed if another user owns the folder.
    """
    set_serve_environment()
    auth.ensure_token()
    private.private_folder("haproxy")
    ray_address.forget_ended()
