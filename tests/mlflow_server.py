"""A real MLflow server, and a proxy in front of it that makes requests fail."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import httpx

FAULTS = ("403", "500", "broken", "slow")
# Seconds. A slow response arrives after the timeout of the client.
SLOW_S, TIMEOUT_S = 1.5, 1
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
}


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Start an MLflow server that stores everything in a folder; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    program = str(Path(sys.executable).with_name("mlflow"))
    options = ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    options += ["--artifacts-destination", f"{folder}/kept", "--workers", "1"]
    server = subprocess.Popen(
        [program, "server", "--port", str(port), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None, "the server exited"
                assert time.monotonic() < deadline, "the server is not ready"
                time.sleep(0.1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


class FaultyProxy:
    """Proxy that forwards requests to a server and makes some of them fail.

    With the fault "slow" the server carries out the request, but its response arrives late.
    count, injected: requests since the last call of `inject`, and how many of them failed.
    """

    def __init__(self, server: str) -> None:
        self._server = urlparse(server).netloc
        self._lock = threading.Lock()
        self.inject(None)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy._handle(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def inject(self, fault: str | None, first: int = 1) -> None:
        """Make all requests from number `first` on fail with one of FAULTS; None stops that."""
        # The client reads this variable for each request.
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(TIMEOUT_S if fault == "slow" else 60)
        with self._lock:
            self._fault, self._first, self.count, self.injected = fault, first, 0, 0

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            self.count += 1
            fault = self._fault if self.count >= self._first else None
            self.injected += fault is not None
        if fault == "broken":
            request.close_connection = True
            return
        if fault in ("403", "500"):
            self._answer(request, int(fault), {}, b"the server says no")
            return
        connection = http.client.HTTPConnection(self._server, timeout=60)
        connection.request(request.command, request.path, body, dict(request.headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if fault == "slow":
            time.sleep(SLOW_S)
        self._answer(request, response.status, dict(response.headers), content)

    def _answer(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes
    ) -> None:
        try:
            request.send_response(status)
            request.send_header("Content-Length", str(len(content)))
            if kind := headers.get("Content-Type"):
                request.send_header("Content-Type", kind)
            request.end_headers()
            request.wfile.write(content)
        except OSError:  # the client has disconnected
            request.close_connection = True
