"""The routes of the Open Inference Protocol v2 and KServe V1 for one model."""

import asyncio
import time

from serve import console
from serve.access import Access
from serve.accesslog import AccessLog
from serve.admission import Terms
from serve.dataplane import DataPlane
from serve.host import Host
from serve.metrics import CONTENT_TYPE, Snapshot, exposition, merged, of_models
from serve.protocol import describe, feedback, openapi, v1, v2
from serve.protocol.http import GET, POST, Answer, Http, Route, Routes, html, json
from serve.protocol.request import Request
from serve.tracing import Tracer
from train.tasks import Arrays, Columns

MODEL = r"/v2/models/(?P<name>[^/]+)"
HEADER_LENGTH = v2.HEADER_LENGTH.encode()
VERSIONED = MODEL + r"(?:/versions/(?P<version>[^/]+))?"


class Rest(Http):
    """Handlers, in the order of their routes."""

    def __init__(
        self, host: Host, *, log: AccessLog | None = None, tracer: Tracer | None = None
    ) -> None:
        super().__init__(
            host.guard,
            max_pending_bytes=host.config.max_pending_bytes,
            log=log,
            tracer=tracer,
        )
        self._host = host
        self.config = host.config
        self.routes = _routes(self)

    def model_of(self, name: str | None) -> str:
        return name or self._host.name

    async def infer(self, request: Request) -> Answer:
        request.protocol = "v2"
        plane, body, began = await self._begin(request)
        header_length = request.header(HEADER_LENGTH)
        limits = self.config.max_rows, self.config.max_json_bytes
        inference = v2.decode(body, header_length, plane.manifest, *limits)
        terms = self._host.terms(inference.parameters, request.client)
        plane, predictions = await self._predictions(
            request, plane, inference.columns, terms, began
        )
        replied = time.perf_counter()
        content, json_length = v2.encode(inference, predictions, plane.manifest, plane.version)
        plane.metrics.stages["reply"].observe(time.perf_counter() - replied)
        if json_length is None:
            return Answer(content)
        headers = {v2.HEADER_LENGTH: str(json_length)}
        return Answer(content, content_type="application/octet-stream", headers=headers)

    async def predict(self, request: Request) -> Answer:
        request.protocol = "v1"
        plane, body, began = await self._begin(request)
        limits = self.config.max_rows, self.config.max_json_bytes
        columns = v1.decode(body, plane.manifest, *limits)
        terms = self._host.terms({}, request.client)
        _, predictions = await self._predictions(request, plane, columns, terms, began)
        return Answer(v1.encode(predictions))

    async def server(self, request: Request) -> Answer:
        return json(describe.server())

    async def live(self, request: Request) -> Answer:
        return json({"live": True})

    async def health(self, request: Request) -> Answer:
        ready = self._host.ready()
        return json({"ready": ready}, 200 if ready else 503)

    async def models(self, request: Request) -> Answer:
        return json({"models": [self._host.name] if request.sees(self._host.name) else []})

    async def model(self, request: Request) -> Answer:
        return json(describe.metadata(self._plane(request), self._host.versions))

    async def ready(self, request: Request) -> Answer:
        return json({"name": self._plane(request).name, "ready": True})

    async def model_config(self, request: Request) -> Answer:
        return json(describe.config(self._plane(request), self.config))

    async def stats(self, request: Request) -> Answer:
        statistics = [describe.statistics(self._plane(request))]
        return json({"model_stats": statistics, **await self._host.repository.stats()})

    async def feedback(self, request: Request) -> Answer:
        limits = self.config.max_json_bytes, self.config.body_timeout_s
        request_id, truths = feedback.decode(await self.body(request, *limits))
        repository = self._host.repository
        return json(await repository.feedback(request.model, request_id, truths, request.actor))

    async def index(self, request: Request) -> Answer:
        return json(await self._host.index(request.key))

    async def load(self, request: Request) -> Answer:
        return json(await self._host.repository.load(request.model, request.actor))

    async def unload(self, request: Request) -> Answer:
        await self._host.repository.unload(request.model, request.actor)
        return json({})

    async def prometheus(self, request: Request) -> Answer:
        counted = of_models(await self._host.repository.metrics(), request.sees)
        return Answer(exposition(counted), content_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Answer:
        return json(openapi.document(self._host.find(request.model).manifest))

    async def docs(self, request: Request) -> Answer:
        return html(openapi.page(request.path, needs_key=self.guard.keys is not None))

    async def manifest(self, request: Request) -> Answer:
        return console.manifest(self._plane(request))

    async def report(self, request: Request) -> Answer:
        plane, name = self._plane(request), request.path.rpartition("/")[2]
        return await asyncio.to_thread(console.report, plane, name)

    def snapshot(self, replica: str) -> Snapshot:
        """What this replica counted, by version; of no version what was asked of none."""
        none = {"model": "", "version": "", "variant": "", "replica": replica}
        return merged([self._host.snapshot(replica), self.metrics.snapshot(none)])

    def _plane(self, request: Request) -> DataPlane:
        """Raises NotFound, Unavailable."""
        plane = self._host.find(request.model, request.version)
        request.named = request.version is not None
        request.metrics, request.version = plane.metrics, plane.version
        return plane

    async def _begin(self, request: Request) -> tuple[DataPlane, bytes, float]:
        plane = self._plane(request)
        body = await self.body(request, self.config.max_body_bytes, self.config.body_timeout_s)
        return plane, body, time.perf_counter()

    async def _predictions(
        self, request: Request, plane: DataPlane, columns: Columns, terms: Terms, began: float
    ) -> tuple[DataPlane, Arrays]:
        """Return the plane that answered, and what."""
        request.rows = len(next(iter(columns.values())))
        plane.metrics.stages["parse"].observe(time.perf_counter() - began)
        answering, predictions = await request.while_connected(
            self._host.infer(plane, columns, terms, request.id, named=request.named)
        )
        request.metrics, request.version = answering.metrics, answering.version
        return answering, predictions


def _routes(rest: Rest) -> Routes:
    repository = "/v2/repository/models/(?P<name>[^/]+)"
    return Routes(
        {
            VERSIONED + "/infer": Route(POST, rest.infer, Access.MODEL),
            r"/v1/models/(?P<name>[^/:]+):predict": Route(POST, rest.predict, Access.MODEL),
            "/v2/?": Route(GET, rest.server, Access.KEY),
            "/v2/health/live": Route(GET, rest.live, Access.OPEN),
            "/v2/health/ready": Route(GET, rest.health, Access.OPEN),
            "/v[12]/models": Route(GET, rest.models, Access.KEY),
            VERSIONED: Route(GET, rest.model, Access.MODEL),
            VERSIONED + "/ready": Route(GET, rest.ready, Access.MODEL),
            r"/v1/models/(?P<name>[^/:]+)": Route(GET, rest.ready, Access.MODEL),
            VERSIONED + "/config": Route(GET, rest.model_config, Access.MODEL),
            VERSIONED + "/stats": Route(GET, rest.stats, Access.MODEL),
            MODEL + "/feedback": Route(POST, rest.feedback, Access.FEEDBACK),
            "/v2/repository/index": Route(POST, rest.index, Access.KEY),
            repository + "/load": Route(POST, rest.load, Access.ADMIN),
            repository + "/unload": Route(POST, rest.unload, Access.ADMIN),
            "/metrics": Route(GET, rest.prometheus, Access.METRICS),
            rf"(?:{MODEL})?/openapi\.json": Route(GET, rest.openapi, Access.MODEL),
            f"(?:{MODEL})?/docs": Route(GET, rest.docs, Access.PAGE),
            "/docs/assets/[^/]+": Route(GET, openapi.asset, Access.OPEN),
            VERSIONED + "/manifest": Route(GET, rest.manifest, Access.MODEL),
            VERSIONED + "/report/[^/]+": Route(GET, rest.report, Access.MODEL),
            "/console/[^/]+": Route(GET, console.asset, Access.OPEN),
            "/": Route(GET, console.page, Access.PAGE),
        }
    )
