"""The gateway: where a request enters a replica, or Ray's own proxy.

Ray Serve asks for middlewares by an import path (see `cluster.serve_environment`). Behind HAProxy
a replica listens itself, and its requests are answered here, by the application that it registered:
Serve's own way from there to the same application costs several times what the application does.
Serve still starts, watches, drains and stops the replica, and scales by the rows it reports.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from serve import bind

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

# What Serve answers itself; and what it would, with the names of applications, which are those of
# models and told by a key only.
HEALTH, LISTING = "/-/healthz", "/-/routes"
# By these a client could switch off Serve's time limit, or its watch for clients that left.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
REQUEST_ID = b"x-request-id"


class ProxyConnection:
    """What Ray's own proxy hands on: the proxy adds the request's id to an answer itself."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        async def without_id(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != REQUEST_ID]
                message = {**message, "headers": headers}
            await send(message)

        await self._application(scope, receive, without_id)


# The application of this process, once its replica is ready.
_local: Application | None = None


def register_app(application: Application | None) -> None:
    global _local
    _local = application


class Gateway:
    """An ASGI middleware."""

    def __init__(self, application: Application) -> None:
        self._serve = application

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            # Nothing here speaks it.
            await receive()
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http":
            if _local is not None and scope["path"] != HEALTH:
                await _local(scope, receive, send)
                return
            if scope["path"] == LISTING:
                await _not_found(send)
                return
            scope["headers"] = [header for header in scope["headers"] if _passes(*header)]
        await self._serve(scope, receive, send)


async def _not_found(send: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"error":"there is nothing here."}'})


def _passes(name: bytes, value: bytes) -> bool:
    # Serve takes every request id for UTF-8.
    return name not in REFUSED_HEADERS and (name != REQUEST_ID or value.isascii())


def middlewares() -> list[Middleware]:
    """What Ray's proxies and replicas ask for before their servers start."""
    bind.set_http_host()
    return [Middleware(Gateway)]
