"""The gateway of a server with several models.

Each model is a Serve application under /v2/models/NAME; HAProxy sends requests for these paths
directly to the model's replicas. The gateway, at /, handles all other paths: it implements the
routes of the whole server, and forwards paths that name a model, such as /v1/models/NAME:predict.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

from serve.access import Access, Guard
from serve.config import GatewayConfig
from serve.errors import NotFound
from serve.http import console, openapi
from serve.http.app import (
    GET,
    JSON,
    POST,
    V1_MODEL,
    HTTPApp,
    Response,
    Route,
    Routes,
    html_response,
    json_response,
)
from serve.http.request import REQUEST_ID, Request
from serve.protocol import metadata
from serve.telemetry.metrics import CONTENT_TYPE, Snapshot, exposition, filter_models, merge_samples

logger = logging.getLogger(__name__)

T = TypeVar("T")


# Seconds to wait for each model in a request that queries all models.
ASK_S = 5.0


class GatewayModel(Protocol):
    """A model's application. A call to it starts a replica if there is none."""

    async def forward(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]: ...


class ModelRepository(Protocol):
    """A model's repository, which represents all its replicas. Calls to it start no replica."""

    async def index(self) -> list[dict[str, Any]]: ...
    async def metrics(self) -> Snapshot: ...


class ModelGateway(HTTPApp):
    """The gateway's HTTP application. Its handlers are in the order of their routes."""

    def __init__(
        self,
        model: Callable[[str], GatewayModel],
        repository: Callable[[str], ModelRepository],
        guard: Guard,
        config: GatewayConfig,
    ) -> None:
        """Set the routes. model, repository: model name → client; these functions may block."""
        super().__init__(guard, max_pending_bytes=config.limits.max_pending_bytes)
        self._model, self._repository = cache(model), cache(repository)
        self._models = config.models
        self._limits = (config.limits.max_body_bytes, config.limits.body_timeout_s)
        named = "/v2/models/(?P<name>[^/]+)"
        both = (*GET, *POST)
        change = "/v2/repository/models/(?P<name>[^/]+)/(load|unload)"
        self.routes = Routes(
            {
                "/v2/?": Route(GET, self.server, Access.KEY),
                "/v2/health/live": Route(GET, self.live, Access.OPEN),
                "/v2/health/ready": Route(GET, self.ready, Access.OPEN),
                "/v[12]/models": Route(GET, self.models, Access.KEY),
                "/v2/repository/index": Route(POST, self.index, Access.KEY),
                change: Route(POST, self.forward, Access.ADMIN),
                V1_MODEL + ":predict": Route(POST, self.forward, Access.MODEL),
                "/v1/models/(?P<name>[^/:]+)": Route(GET, self.forward, Access.MODEL),
                f"{named}/feedback": Route(POST, self.forward, Access.FEEDBACK),
                f"{named}/docs": Route(GET, self.forward, Access.PAGE),
                f"{named}(?:/.*)?": Route(both, self.forward, Access.MODEL),
                "/metrics": Route(GET, self.prometheus, Access.METRICS),
                "/docs": Route(GET, self.docs, Access.PAGE),
                "/docs/assets/[^/]+": Route(GET, openapi.docs_file, Access.OPEN),
                "/console/[^/]+": Route(GET, console.console_file, Access.OPEN),
                "/": Route(GET, console.console_page, Access.PAGE),
            }
        )

    async def server(self, request: Request) -> Response:
        """Return the name, version and protocol extensions of the server."""
        return json_response(metadata.server_metadata())

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """Report whether all versions of all models are ready."""
        states = [state["state"] for state in await self._indexes()]
        ready = all(state == "READY" for state in states)
        return json_response({"ready": ready}, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        """List the models that the key may use."""
        return json_response({"models": [name for name in self._models if request.sees(name)]})

    async def index(self, request: Request) -> Response:
        """List the versions and states of the models that the key may use."""
        return json_response(
            [model for model in await self._indexes() if request.sees(model["name"])]
        )

    async def forward(self, request: Request) -> Response:
        """Forward a request to its model. Raises NotFound if the model is not served here."""
        if request.model not in self._models:
            raise NotFound(
                f"model '{request.model[:100]}' is not served here; GET /v2/models lists those "
                "that are."
            )
        body = await self.body(request, *self._limits) if request.method == "POST" else b""
        given = [header for header in request.scope["headers"] if header[0] != REQUEST_ID]
        headers = [*given, (REQUEST_ID, request.id.encode("latin-1"))]
        model = await asyncio.to_thread(self._model, request.model)
        status, replied, content = await request.while_connected(
            model.forward(request.method, request.path, headers, body)
        )
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in replied}
        for name in ("content-length", REQUEST_ID.decode()):
            named.pop(name, None)
        return Response(content, status, named.pop("content-type", JSON), named)

    async def prometheus(self, request: Request) -> Response:
        """Return the metrics of all replicas of the models that the key may use."""

        async def of(name: str) -> Snapshot:
            repository = await asyncio.to_thread(self._repository, name)
            return await repository.metrics()

        found = await self._of_each(of)
        snapshots = [snapshot for snapshot in found.values() if snapshot is not None]
        counted = filter_models(merge_samples(snapshots), request.sees)
        return Response(exposition(counted), content_type=CONTENT_TYPE)

    async def docs(self, request: Request) -> Response:
        """Return a page with a link to the API page of each model."""
        # A browser that follows a link sends no key, so model names are not shown if keys are used.
        return html_response(openapi.docs_index([] if self.guard.keys else self._models))

    async def _indexes(self) -> list[dict[str, Any]]:
        async def of(name: str) -> list[dict[str, Any]]:
            repository = await asyncio.to_thread(self._repository, name)
            return await repository.index()

        indexes: list[dict[str, Any]] = []
        for name, found in (await self._of_each(of)).items():
            gone = {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "no answer"}
            indexes.extend([gone] if found is None else found)
        return indexes

    async def _of_each(self, ask: Callable[[str], Awaitable[T]]) -> dict[str, T | None]:
        """Call `ask` for each model; the result is None if it fails or takes over ASK_S seconds."""

        async def one(name: str) -> T | None:
            try:
                async with asyncio.timeout(ASK_S):
                    return await ask(name)
            except Exception:
                logger.exception("model %s did not respond", name)
                return None

        answers = await asyncio.gather(*map(one, self._models))
        return dict(zip(self._models, answers, strict=True))


async def call_app(
    application: HTTPApp,
    method: str,
    path: str,
    headers: Sequence[tuple[bytes, bytes]],
    body: bytes,
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Run an application on a request that was forwarded. Return status, headers and body."""
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
