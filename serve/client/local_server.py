"""Start a server as `serve run serve.app` does, in a child process that ends with this one."""

import atexit
import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import urllib3

from cluster import connect
from cluster.errors import CommandFailed, UserError
from serve.client.client import Client
from serve.config import ServeConfig, validate_options
from train.bundle import Bundle

POLL_S = 0.2
STOP_S = 60.0
# Lines of the server's output that an error may be in.
KEPT_LINES = 50


class Server:
    """A server in a child process. As a context manager it stops when the block ends."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        """url: where a client on this machine reaches the server."""
        self.url = url
        self._process = process
        atexit.register(self.stop)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self, **options: Any) -> Client:
        """Return a client of this server. options: as `Client` takes them."""
        return Client(self.url, **options)

    @property
    def running(self) -> bool:
        """Whether the server's process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Complete the requests in progress and stop the server. Does nothing if it has stopped."""
        atexit.unregister(self.stop)
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def deploy(
    model: str | Bundle = "models:/digits@production", *, timeout_s: float = 600.0, **options: Any
) -> Server:
    """Serve a model, and return once the server responds.

        with deploy("models:/taxis@production", replicas="1-4") as server:
            server.client().predict(records)

    model: models:/NAME@ALIAS, models:/NAME/VERSION, the location of a bundle, or a bundle.
    options: those of `serve run serve.app`, a section as a mapping: limits={"timeout_s": 5}.
    timeout_s: longest wait for the server. The server's messages appear on stderr. It runs on
    the cluster at RAY_ADDRESS if that is set, otherwise on this machine.

    Raises UserError for options or a model that cannot be served, CommandFailed if the server does
    not start in time.
    """
    location = model.location if isinstance(model, Bundle) else model
    config = validate_options({"model": location, **options})
    connect.check_port_free(config.host, config.port)
    process = subprocess.Popen(
        [*_serve_command(), "run", "serve.app", *_arguments({"model": location, **options})],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
    forwarding = threading.Thread(target=_forward, args=(process, lines), daemon=True)
    forwarding.start()
    server = Server(process, config.local_url)
    try:
        _wait(server, config, timeout_s)
    except BaseException:
        server.stop()
        raise
    if not server.running:
        forwarding.join()
        raise _failure(process.returncode, lines)
    return server


def _serve_command() -> list[str]:
    """Ray Serve's command of this Python, whatever PATH says."""
    beside = Path(sys.executable).with_name("serve")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "ray.serve.scripts"]


def _arguments(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return options as `serve run` takes them: NAME=VALUE, sections with a dot."""
    given: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            given += _arguments(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            given.append(f"{prefix}{name}={','.join(map(str, value))}")
        elif value is not None:
            given.append(f"{prefix}{name}={value}")
    return given


def _forward(process: "subprocess.Popen[str]", lines: "collections.deque[str]") -> None:
    assert process.stderr is not None, "a pipe"
    for line in process.stderr:
        lines.append(line.strip())
        print(line, end="", file=sys.stderr, flush=True)


def _wait(server: Server, config: ServeConfig, timeout_s: float) -> None:
    """Return once the server responds or has ended. Raises CommandFailed."""
    deadline = time.monotonic() + timeout_s
    # Certificates are for the names that clients use, not for this machine's.
    with urllib3.PoolManager(cert_reqs="CERT_NONE", retries=False, timeout=5.0) as pool:
        while server.running:
            try:
                if pool.request("GET", f"{server.url}/v2/health/ready").status == 200:
                    return
            except urllib3.exceptions.SSLError:
                if config.security.tls_client_ca:  # it responds, and requires a certificate
                    return
            except urllib3.exceptions.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise CommandFailed(
                    f"the server of {config.model} is not ready after {timeout_s:g} s; its "
                    "messages are above. A larger timeout_s waits longer."
                )
            time.sleep(POLL_S)


def _failure(status: int, lines: "collections.deque[str]") -> Exception:
    """Return the error that the server's last lines state."""
    stated = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    message = stated[-1] if stated else f"the server ended with exit status {status}."
    return UserError(message) if status == 2 else CommandFailed(message)
