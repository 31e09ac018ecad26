"""Start `serve run serve.app` as a user does, wait until it is ready, and stop it."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
URL = "http://127.0.0.1:8000"
# Seconds; long enough for a machine whose cores are all busy.
READY_S = 600
STOP_S = 180


def start(
    *arguments: str,
    log: Path,
    app: str = "serve.app",
    environment: Mapping[str, str] | None = None,
    ready: str = "/v2/health/ready",
    tls: ssl.SSLContext | None = None,
    cwd: Path = REPOSITORY,
) -> subprocess.Popen[bytes]:
    """Start the server with its output in `log`; return once the path `ready` responds with 200.

    tls: context of the client, for options that make the server use TLS.
    Raises RuntimeError with the end of the log if the server exits or is not ready in time.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            raise RuntimeError("a server is already running on port 8000; stop it first")
    command = [str(Path(sys.executable).with_name("serve")), "run", app, *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url(tls)}{ready}", verify=tls or True).status_code == 200:
                return process
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    stop(process)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"the server was not ready within {READY_S} s; its log ends:\n{end}")


def url(tls: ssl.SSLContext | None) -> str:
    return URL.replace("http:", "https:") if tls else URL


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and the Ray cluster that it started."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running(*arguments: str, **options: Any) -> Iterator[str]:
    """Run the server during the block and yield its URL. For the options see `start`."""
    process = start(*arguments, **options)
    try:
        yield url(options.get("tls"))
    finally:
        stop(process)
