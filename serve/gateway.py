"""The gateway: where a request enters a replica, or Ray's own proxy.

Ray Serve asks for middlewares by an import path (see `serve.ingress`). Behind HAProxy a replica
listens itself, and its requests are answered here, by the application that it registered: Serve's
own way from there to the same application costs several times what the application does. Serve
still starts, watches, drains and stops the replica, and scales by the rows it reports.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

# What Serve answers itself.
SYSTEM = "/-/"
# By these a client could switch off Serve's time limit, or its watch for clients that left.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")

# The application of this process, once its replica is ready.
_local: Application | None = None


def register(application: Application) -> None:
    global _local
    _local = application


class Gateway:
    """An ASGI middleware."""

    def __init__(self, application: Application) -> None:
        self._serve = application

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if _local is not None and not scope["path"].startswith(SYSTEM):
                await _local(scope, receive, send)
                return
            scope["headers"] = [
                header for header in scope["headers"] if header[0] not in REFUSED_HEADERS
            ]
        await self._serve(scope, receive, send)


def middlewares() -> list[Middleware]:
    return [Middleware(Gateway)]
