"""HTTP: from an ASGI connection to a request, and from an answer or an error back.

What every route has in common: who asks, how much and how slowly they may send, what an error looks
like, the log and the metrics. Plain ASGI, as this is on the path of every request.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from serve.access import Access, Guard
from serve.errors import MethodNotAllowed, NotFound, PayloadTooLarge, RequestError, RequestTimeout
from serve.http.request import REQUEST_ID, PendingBodies, Receive, Request
from serve.telemetry.recorder import RequestRecorder

logger = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON = "application/json"


@dataclass
class Response:
    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers=headers or {})


def error_response(error: RequestError) -> Response:
    headers = error.headers
    if isinstance(error, PayloadTooLarge | RequestTimeout) or error.reason == "pending_bytes":
        # The rest of the body is not waited for.
        headers = {**headers, "Connection": "close"}
    return json_response({"error": str(error)}, error.status, headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    """There is nothing to start or stop: a replica has done so before it listens."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


class HTTPApp:
    """An ASGI application. A subclass has the routes."""

    routes: "Routes"

    def __init__(
        self,
        guard: Guard,
        *,
        max_pending_bytes: int,
        recorder: RequestRecorder | None = None,
    ) -> None:
        self._pending = PendingBodies(max_pending_bytes)
        self.guard = guard
        self.recorder = recorder or RequestRecorder()

    async def body(self, request: Request, max_bytes: int, timeout_s: float) -> bytes:
        """Raises PayloadTooLarge, Overloaded, RequestTimeout, ClientDisconnected."""
        return await request.body(max_bytes, timeout_s, self._pending)

    def model_of(self, name: str | None) -> str:
        """The model that a request is about. name: of the path; None where it names none."""
        return name or ""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        request = Request(scope, receive)
        answer = await self._answer(request)
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            (REQUEST_ID, request.id.encode("latin-1")),
            *((name.lower().encode(), value.encode()) for name, value in answer.headers.items()),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        body = b"" if request.method == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})
        self.recorder.record(request, answer.status)

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._admitted(request).handler(request)
        except RequestError as error:
            self.recorder.refuse(request, error.reason)
            return error_response(error)
        except Exception:
            # What went wrong is in the log; a client gets none of the server's insides.
            logger.exception("request failed: %s", request.path[:200])
            return json_response({"error": "the server failed to answer this request."}, 500)

    def _admitted(self, request: Request) -> "Route":
        """Return what answers a request that may be asked. Raises RequestError."""
        guard, problem, route = self.guard, None, None
        try:
            route, parts = self.routes.match(request.method, request.path)
        except RequestError as error:
            problem = error
        access = route.access if route else None
        guard.check_page(request.header, method=request.method, access=access)
        if guard.needs_key(access):
            request.key = guard.authenticate(request.header(b"authorization"))
        if route is None:
            assert problem is not None
            raise problem
        request.model, request.version = self.model_of(parts.get("name")), parts.get("version")
        guard.authorize(request.key, route.access, request.model)
        return route


def html_response(page: str) -> Response:
    """A page. No other site may show it in a frame, where its buttons could be clicked unseen."""
    headers = {
        "Content-Security-Policy": "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(page.encode(), content_type="text/html; charset=utf-8", headers=headers)


Handler = Callable[[Request], Awaitable[Response]]
GET, POST = ("GET", "HEAD"), ("POST",)
# The longest path whose handler is remembered.
MAX_KNOWN = 256


@dataclass(frozen=True)
class Route:
    """What answers a path, and what a request must bring for that."""

    methods: tuple[str, ...]
    handler: Handler
    access: Access


class Routes:
    """Which route a path takes. Patterns name the parts of a path that handlers need."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        """routes: by the pattern of the whole path."""
        self.by_pattern = dict(routes)
        self._compiled = [(re.compile(pattern), route) for pattern, route in routes.items()]
        self._known = lru_cache(1024)(self._find)

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str | None]]:
        """Return the route and the named parts. Raises NotFound, or MethodNotAllowed."""
        # Clients choose paths: only a bounded memory of them is kept.
        return (self._known if len(path) <= MAX_KNOWN else self._find)(method, path)

    def _find(self, method: str, path: str) -> tuple[Route, dict[str, str | None]]:
        allowed: list[str] = []
        for pattern, route in self._compiled:
            if match := pattern.fullmatch(path):
                if method in route.methods:
                    return route, match.groupdict()
                allowed.extend(route.methods)
        if allowed:
            raise MethodNotAllowed(
                f"{method} {path[:200]}: expected {' or '.join(allowed)}.", allowed
            )
        raise NotFound(f"{method} {path[:200]}: there is nothing here. See /docs.")
