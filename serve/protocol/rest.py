"""HTTP: the routes of the Open Inference Protocol v2 and KServe V1, as an ASGI application."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

from serve.config import ServeConfig
from serve.dataplane import DataPlane
from serve.errors import BodyTooLarge, RequestError
from serve.protocol import openapi, v1, v2

Handler = Callable[[Request], Awaitable[Response]]


def build(plane: DataPlane, config: ServeConfig) -> Starlette:
    """Return the application that serves one data plane."""
    return Starlette(
        routes=Rest(plane, config).routes(),
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            Exception: _failure,
        },
    )


class Rest:
    """Handlers, in the order of their routes."""

    def __init__(self, plane: DataPlane, config: ServeConfig) -> None:
        self._plane = plane
        self._max_body_bytes = config.max_body_bytes
        self._max_rows = config.max_rows

    def routes(self) -> list[Route | Mount]:
        versioned = "/v2/models/{name}/versions/{version}"
        return [
            Route("/v2/models/{name}/infer", self.infer, methods=["POST"]),
            Route(f"{versioned}/infer", self.infer, methods=["POST"]),
            Route("/v1/models/{name}:predict", self.predict, methods=["POST"]),
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.live),
            Route("/v2/models/{name}", self.model),
            Route(versioned, self.model),
            Route("/v2/models/{name}/ready", self.ready),
            Route(f"{versioned}/ready", self.ready),
            Route("/v1/models/{name}", self.ready),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.docs),
            Mount("/docs/assets", StaticFiles(directory=Path(swagger_ui_path))),
            Route("/", self.root),
        ]

    async def infer(self, request: Request) -> Response:
        plane = self._plane
        plane.check_name(request.path_params["name"], request.path_params.get("version"))
        body = await self._body(request)
        header_length = request.headers.get(v2.HEADER_LENGTH)
        inference = v2.decode(body, header_length, plane.manifest, self._max_rows)
        predictions = await plane.infer(inference.columns)
        content, json_length = v2.encode(inference, predictions, plane.manifest, plane.version)
        if json_length is None:
            return Response(content, media_type="application/json")
        headers = {v2.HEADER_LENGTH: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def predict(self, request: Request) -> Response:
        plane = self._plane
        plane.check_name(request.path_params["name"])
        columns = v1.decode(await self._body(request), plane.manifest, self._max_rows)
        predictions = await plane.infer(columns)
        return Response(v1.encode(predictions), media_type="application/json")

    async def server(self, request: Request) -> Response:
        version = self._plane.manifest.format_version
        return _json({"name": "halyard", "version": str(version), "extensions": v2.EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return Response()

    async def model(self, request: Request) -> Response:
        plane = self._plane
        plane.check_name(request.path_params["name"], request.path_params.get("version"))
        manifest = plane.manifest
        return _json(
            {
                "name": plane.name,
                "versions": [plane.version],
                "platform": manifest.variants[plane.variant].engine,
                "inputs": [tensor.model_dump() for tensor in manifest.inputs],
                "outputs": [tensor.model_dump() for tensor in manifest.outputs],
                "parameters": {"variant": plane.variant},
            }
        )

    async def ready(self, request: Request) -> Response:
        self._plane.check_name(request.path_params["name"], request.path_params.get("version"))
        return _json({"name": self._plane.name, "ready": True})

    async def openapi(self, request: Request) -> Response:
        return _json(openapi.document(self._plane.manifest))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(openapi.PAGE)

    async def root(self, request: Request) -> Response:
        return RedirectResponse("/docs")

    async def _body(self, request: Request) -> bytes:
        """Raises BodyTooLarge as soon as that is known, before the rest is received."""
        declared = request.headers.get("content-length", "")
        size_bytes = int(declared) if declared.isdecimal() else 0
        chunks: list[bytes] = []
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if max(size_bytes, received) > self._max_body_bytes:
                raise BodyTooLarge(
                    f"the body has {max(size_bytes, received)} bytes; "
                    f"at most {self._max_body_bytes} are accepted."
                )
            chunks.append(chunk)
        return b"".join(chunks)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = orjson.dumps(value)
    return Response(content, status, headers=headers, media_type="application/json")


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _json({"error": str(error)}, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}."
    if error.status_code == 404:
        message += " See /docs."
    return _json({"error": message}, error.status_code, dict(error.headers or {}))


async def _failure(request: Request, error: Exception) -> Response:
    # What went wrong is in the log; a client gets none of the server's insides.
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return _json({"error": "the server failed to answer this request."}, 500)
