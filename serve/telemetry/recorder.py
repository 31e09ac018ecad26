"""What is recorded of each request, whatever its protocol: metrics, the access log, a trace."""

import time
from collections.abc import Awaitable, Mapping
from typing import TypeVar
from urllib.parse import quote

from serve.access import Actor
from serve.security import APIKey
from serve.telemetry.access_log import AccessLog
from serve.telemetry.metrics import VersionMetrics
from serve.telemetry.tracing import Tracer

T = TypeVar("T")

# Longest text that a client chooses and that is logged.
MAX_TEXT = 100


def owned_id(owner: str, request_id: str) -> str:
    """Return the id by which a request of a key is kept. owner: "" where there are no keys."""
    return f"{quote(owner, safe='')}/{request_id}" if owner else request_id


class RequestContext:
    """A request of any protocol, and what it turns out to be about.

    The handlers write into it what the recorder reads.

    method, path: as the access log names them; for gRPC "gRPC" and the method's name.
    protocol: "v1", "v2" or "grpc" for inference, "http" for anything else.
    model: name of the model, "" if none is named. version: that is asked for, then that answers.
    rows: records in the request. metrics: of the version that answers.
    """

    __slots__ = (
        *("id", "method", "path", "protocol", "model", "version", "rows"),
        *("key", "metrics", "began_ns", "began"),
    )

    def __init__(self, id: str, method: str, path: str) -> None:
        self.id, self.method, self.path = id, method, path
        self.protocol = "http"
        self.model = ""
        self.version: str | None = None
        self.rows = 0
        self.key: APIKey | None = None
        self.metrics: VersionMetrics | None = None
        self.began_ns, self.began = time.time_ns(), time.perf_counter()

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers or metadata, by their names in lower case."""
        raise NotImplementedError

    def header(self, name: bytes) -> str | None:
        """Return a header or metadata value. name: in lower case."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """The client's address."""
        raise NotImplementedError

    async def while_connected(self, response: Awaitable[T]) -> T:
        """Await a response, for as long as the client waits for it."""
        return await response

    @property
    def client(self) -> str:
        """The name of the client's key, or what the client calls itself."""
        return self.key.name if self.key else self.header(b"x-client-id") or ""

    @property
    def record_id(self) -> str:
        """The id under which its predictions are kept.

        An id that a client chose is its own: that of another key is another request.
        """
        return owned_id(self.key.name if self.key else "", self.id)

    @property
    def actor(self) -> Actor:
        """Who asks, for the audit log."""
        return Actor(self.client[:MAX_TEXT], self.address[:MAX_TEXT], self.id)


class RequestRecorder:
    """Records requests that have been answered. Belongs to one event loop.

    metrics: of requests that are about no model.
    """

    def __init__(self, log: AccessLog | None = None, tracer: Tracer | None = None) -> None:
        self.metrics = VersionMetrics()
        self._log, self._tracer = log, tracer

    def refuse(self, request: RequestContext, reason: str) -> None:
        """Count a request that is refused."""
        (request.metrics or self.metrics).refused[reason] += 1

    def record(self, request: RequestContext, status: int) -> None:
        """Count a request that was answered with an HTTP status; log and trace it."""
        seconds = time.perf_counter() - request.began
        (request.metrics or self.metrics).answered(request.protocol, status, seconds)
        version = request.version and request.version[:MAX_TEXT]
        if self._log is not None:
            self._log.add(
                status,
                {
                    "time": request.began_ns / 1e9,
                    "id": request.id,
                    "method": request.method,
                    "path": request.path[:200],
                    "status": status,
                    "ms": round(seconds * 1e3, 3),
                    "model": request.model[:MAX_TEXT],
                    "version": version,
                    "rows": request.rows,
                    "client": request.client[:MAX_TEXT],
                },
            )
        if self._tracer is not None:
            self._tracer.request(
                f"{request.method} {request.protocol}",
                request.headers,
                request.began_ns,
                request.began_ns + int(seconds * 1e9),
                {
                    "http.request.method": request.method,
                    "http.response.status_code": status,
                    "url.path": request.path[:200],
                    "halyard.model": request.model[:MAX_TEXT],
                    "halyard.version": version or "",
                    "halyard.rows": request.rows,
                },
            )
