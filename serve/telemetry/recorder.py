"""Records every request of any protocol: metrics, access log and trace."""

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

# Characters that are logged of a text that a client chooses.
MAX_TEXT = 100


def owned_id(owner: str, request_id: str) -> str:
    """Return the id under which a request is stored. owner: name of its API key, "" without one."""
    return f"{quote(owner, safe='')}/{request_id}" if owner else request_id


class RequestContext:
    """A request of any protocol. The handlers fill in its fields and the recorder reads them.

    method, path: as in the access log; for gRPC "gRPC" and the method's name.
    protocol: "v1", "v2" or "grpc" for inference, "http" for all other requests.
    model: name of the model, "" if the request names none. version: first the requested version,
    later the one that answers. rows: records in the request. metrics: of the version that answers.
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
        """Headers or metadata by name, in lower case."""
        raise NotImplementedError

    def header(self, name: bytes) -> str | None:
        """Return a header or metadata value; None without one. name: in lower case."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """The client's address."""
        raise NotImplementedError

    async def while_connected(self, response: Awaitable[T]) -> T:
        """Await a response for as long as the client stays connected."""
        return await response

    @property
    def client(self) -> str:
        """The name of the client's API key, or its X-Client-Id header, or ""."""
        return self.key.name if self.key else self.header(b"x-client-id") or ""

    @property
    def record_id(self) -> str:
        """The id under which the request's predictions are stored.

        It includes the name of the API key, because clients may choose ids that others also use.
        """
        return owned_id(self.key.name if self.key else "", self.id)

    @property
    def actor(self) -> Actor:
        """The client, for the audit log."""
        return Actor(self.client[:MAX_TEXT], self.address[:MAX_TEXT], self.id)


class RequestRecorder:
    """Records requests that have been answered. Belongs to one event loop.

    metrics: of requests that belong to no model.
    """

    def __init__(self, log: AccessLog | None = None, tracer: Tracer | None = None) -> None:
        self.metrics = VersionMetrics()
        self._log, self._tracer = log, tracer

    def refuse(self, request: RequestContext, reason: str) -> None:
        """Count a refused request. reason: value of the metric's label."""
        (request.metrics or self.metrics).refused[reason] += 1

    def record(self, request: RequestContext, status: int) -> None:
        """Count, log and trace a request that was answered with an HTTP status."""
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
