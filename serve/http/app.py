"""The base of the HTTP applications: from an ASGI connection to a request and a response.

It implements what all routes share: authentication, limits on the size and duration of bodies,
error responses, the access log and metrics. It uses ASGI without a framework for speed.
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
    """An HTTP response."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with `value` as JSON."""
    return Response(orjson.dumps(value), status, headers=headers or {})


def error_response(error: RequestError) -> Response:
    """Return the JSON response of an error, with the error's status and headers."""
    headers = error.headers
    if isinstance(error, PayloadTooLarge | RequestTimeout) or error.reason == "pending_bytes":
        # The rest of the body is not read, so the connection cannot be used again.
        headers = {**headers, "Connection": "close"}
    return json_response({"error": str(error)}, error.status, headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    """Confirm startup and shutdown. There is nothing to do: replicas start before they listen."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


class HTTPApp:
    """An ASGI application. Subclasses set `routes`."""

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
        """Return the body of a request; see `Request.body` for the errors that it raises."""
        return await request.body(max_bytes, timeout_s, self._pending)

    def model_of(self, name: str | None) -> str:
        """Return the model of a request. name: the model in the path; None if it has none."""
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
            # The log has the traceback; clients receive no internal details.
            logger.exception("request failed: %s", request.path[:200])
            return json_response({"error": "the server failed to process this request."}, 500)

    def _admitted(self, request: Request) -> "Route":
        """Return the route of a request, after checking its key, origin and access.

        Raises RequestError.
        """
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
    """Return an HTML page. Other sites may not show it in a frame, to prevent clickjacking."""
    headers = {
        "Content-Security-Policy": "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(page.encode(), content_type="text/html; charset=utf-8", headers=headers)


Handler = Callable[[Request], Awaitable[Response]]
GET, POST = ("GET", "HEAD"), ("POST",)
# KServe V1 has no paths of versions; they follow those of v2.
V1_MODEL = r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[^/:]+))?"
# Longest path, in characters, whose route is cached.
MAX_KNOWN = 256


@dataclass(frozen=True)
class Route:
    """The handler of a path, its methods, and the access that it requires."""

    methods: tuple[str, ...]
    handler: Handler
    access: Access


class Routes:
    """Finds the route of a path. Named groups of the patterns are the path's parameters."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        """Compile the patterns. routes: pattern of the whole path → route; the first match wins."""
        self.by_pattern = dict(routes)
        self._compiled = [(re.compile(pattern), route) for pattern, route in routes.items()]
        self._known = lru_cache(1024)(self._find)

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str | None]]:
        """Return the route of a path and the path's parameters.

        Raises NotFound if no pattern matches, MethodNotAllowed if none has this method.
        """
        # Clients choose the paths, so the cache has bounds on the number and length of its keys.
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
                f"{method} {path[:200]} is not allowed; expected {' or '.join(allowed)}.", allowed
            )
        raise NotFound(f"{method} {path[:200]} does not exist. See /docs.")
