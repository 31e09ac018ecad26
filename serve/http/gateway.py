"""The ASGI middleware through which requests enter a replica or Ray's own proxy.

Ray Serve loads the middleware by its import path (see `cluster.serve_environment`). Behind HAProxy,
a replica has its own HTTP server. There the middleware calls the application that the replica
registered, because Serve's own path to the same application costs several times as much as the
application itself. Serve still starts, monitors, drains and stops the replica, and scales by the
rows that the replica reports.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from serve import bind

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

# Serve handles HEALTH. LISTING is blocked: Serve would return the names of applications, which are
# the names of models and require a key.
HEALTH, LISTING = "/-/healthz", "/-/routes"
# These headers would let a client disable Serve's time limit, or its detection of disconnects.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
REQUEST_ID = b"x-request-id"


class ProxyConnection:
    """Removes the request id from responses to Ray's own proxy, which adds the id itself."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        async def without_id(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != REQUEST_ID]
                message = {**message, "headers": headers}
            await send(message)

        await self._application(scope, receive, without_id)


# The application of this process; set once its replica is ready.
_local: Application | None = None


def register_app(application: Application | None) -> None:
    """Set the application that handles the requests of this process; None removes it."""
    global _local
    _local = application


class Gateway:
    """ASGI middleware that calls the registered application, or Serve if there is none."""

    def __init__(self, application: Application) -> None:
        self._serve = application

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            # There are no WebSocket routes.
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
    await send({"type": "http.response.body", "body": b'{"error":"this path does not exist."}'})


def _passes(name: bytes, value: bytes) -> bool:
    # Serve decodes request ids as UTF-8 and would fail on others.
    return name not in REFUSED_HEADERS and (name != REQUEST_ID or value.isascii())


def middlewares() -> list[Middleware]:
    """Return the middlewares. Ray's proxies and replicas call this before their servers start."""
    bind.set_http_host()
    return [Middleware(Gateway)]
