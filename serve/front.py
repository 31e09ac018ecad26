"""The front of several models: what belongs to none of them, or comes by a path of the server's.

Each model is an application of its own under /v2/models/NAME, which HAProxy leads to its replicas
directly. The front, at /, answers the rest, and hands on what names a model elsewhere.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from serve.errors import NotFound, RequestError
from serve.metrics import CONTENT_TYPE, exposition, merged
from serve.protocol import describe, openapi
from serve.protocol.http import GET, POST, Answer, Http, Request, Routes, html, json
from serve.security import Key


class Model(Protocol):
    """A model's application."""

    async def forward(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]: ...
    async def index(self) -> list[dict[str, Any]]: ...
    async def metrics(self) -> Any: ...


class Front(Http):
    """Handlers, in the order of their routes."""

    def __init__(
        self,
        models: Sequence[str],
        find: Callable[[str], Model],
        key: Callable[[str | None], Key | None],
        *,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        super().__init__(key)
        self._models = list(models)
        self._find_model = find
        self._limits = (max_body_bytes, body_timeout_s)
        self._find = Routes(
            {
                "/v2/?": (GET, self.server),
                "/v2/health/live": (GET, self.live),
                "/v2/health/ready": (GET, self.ready),
                "/v[12]/models": (GET, self.models),
                "/v2/repository/index": (POST, self.index),
                "/v2/repository/models/(?P<name>[^/]+)/(load|unload)": (POST, self.forward),
                "/v1/models/(?P<name>[^/:]+):predict": (POST, self.forward),
                "/v1/models/(?P<name>[^/:]+)": (GET, self.forward),
                "/metrics": (GET, self.prometheus),
                "/docs": (GET, self.docs),
                "/docs/assets/[^/]+": (GET, openapi.asset),
                "/": (GET, openapi.root),
            }
        ).find

    async def handle(self, request: Request) -> Answer:
        handler, parts = self._find(request.method, request.path)
        request.model = parts.get("name") or ""
        return await handler(request)

    async def server(self, request: Request) -> Answer:
        return json(describe.server())

    async def live(self, request: Request) -> Answer:
        return json({"live": True})

    async def ready(self, request: Request) -> Answer:
        states = [state["state"] for state in await self._indexes()]
        ready = all(state == "READY" for state in states)
        return json({"ready": ready}, 200 if ready else 503)

    async def models(self, request: Request) -> Answer:
        return json({"models": self._models})

    async def index(self, request: Request) -> Answer:
        return json(await self._indexes())

    async def forward(self, request: Request) -> Answer:
        if request.model not in self._models:
            raise NotFound(
                f"model '{request.model[:100]}' is not served here; {', '.join(self._models)} are."
            )
        body = await request.body(*self._limits) if request.method == "POST" else b""
        headers = list(request.scope["headers"])
        model = self._find_model(request.model)
        status, replied, content = await model.forward(request.method, request.path, headers, body)
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in replied}
        named.pop("content-length", None)
        return Answer(content, status, named.pop("content-type", "application/json"), named)

    async def prometheus(self, request: Request) -> Answer:
        snapshots = await asyncio.gather(
            *(self._find_model(name).metrics() for name in self._models)
        )
        return Answer(exposition(merged(snapshots)), content_type=CONTENT_TYPE)

    async def docs(self, request: Request) -> Answer:
        return html(openapi.list_page(self._models))

    async def _indexes(self) -> list[dict[str, Any]]:
        async def of(name: str) -> list[dict[str, Any]]:
            try:
                return await self._find_model(name).index()
            except RequestError as error:
                return [{"name": name, "version": "", "state": "UNAVAILABLE", "reason": str(error)}]

        return [
            state for states in await asyncio.gather(*map(of, self._models)) for state in states
        ]


async def call(
    application: Http, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Let an application answer a request that came another way; (status, headers, body)."""
    sent: list[dict[str, Any]] = []
    received = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if received:
            return received.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await application(scope, receive, send)
    return sent[0]["status"], sent[0]["headers"], sent[1]["body"]
