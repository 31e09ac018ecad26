"""The routes of the Open Inference Protocol v2 and KServe V1 for one model."""

import asyncio
from collections.abc import Mapping

from serve.access import Access
from serve.errors import Forbidden
from serve.http import console, openapi
from serve.http.app import (
    GET,
    POST,
    V1_MODEL,
    HTTPApp,
    Response,
    Route,
    Routes,
    html_response,
    json_response,
)
from serve.http.content import (
    HEADER_LENGTH,
    check_charset,
    decompress,
    form_fields,
    is_form,
    is_picture,
    parsed_bytes,
)
from serve.http.request import Request
from serve.inference.dataplane import DataPlane
from serve.protocol import feedback, repository, v1, v2
from serve.protocol.fields import match_fields, plain_fields
from serve.protocol.metadata import model_config, model_metadata, model_statistics, server_metadata
from serve.protocol.v2 import InferRequest
from serve.replica.handler import InferenceHandler
from serve.replica.json_process import JSONProcess
from serve.replica.large_bodies import INLINE_BYTES
from serve.replica.pipeline import Endpoint
from serve.telemetry.metrics import CONTENT_TYPE, Snapshot, exposition, filter_models, merge_samples
from serve.telemetry.recorder import RequestRecorder, owned_id
from train.bundle.manifest import Manifest
from train.tasks import Arrays

MODEL = r"/v2/models/(?P<name>[^/]+)"
VERSIONED = MODEL + r"(?:/versions/(?P<version>[^/]+))?"


class ModelAPI(HTTPApp):
    """The HTTP application of one model. Its handlers are in the order of their routes."""

    def __init__(self, handler: InferenceHandler, recorder: RequestRecorder | None = None) -> None:
        super().__init__(
            handler.guard,
            max_pending_bytes=handler.config.limits.max_pending_bytes,
            recorder=recorder,
        )
        self._handler = handler
        self.config = handler.config
        self._json_process = JSONProcess()
        self.routes = _routes(self)

    def model_of(self, name: str | None) -> str:
        return name or self._handler.name

    async def infer_v2(self, request: Request) -> Response:
        """Handle an inference request of the Open Inference Protocol v2."""
        request.protocol = "v2"
        endpoint, received = await self._begin(request)
        header_length = request.header(HEADER_LENGTH)

        def decode() -> InferRequest:
            limits, manifest = self.config.limits, endpoint.plane.manifest
            body = decompress(request, received, limits.max_body_bytes)
            if is_form(request.content_type):
                return self._of_form(request, body, manifest)
            is_image = is_picture(request.content_type)
            if not is_image and v2.json_bytes(body, header_length) > INLINE_BYTES:
                return self._decode_elsewhere("v2", body, manifest, header_length)
            return v2.decode(
                body,
                header_length,
                manifest,
                limits.max_rows,
                limits.max_json_bytes,
                is_image=is_image,
                unknown_fields=limits.unknown_fields,
            )

        def encode(inference: InferRequest, predictions: Arrays, plane: DataPlane) -> Response:
            encoded = v2.encode(inference, predictions, plane.manifest, plane.version)
            content, json_length = encoded
            if json_length is None:
                return Response(content)
            headers = {v2.HEADER_LENGTH: str(json_length)}
            return Response(content, content_type="application/octet-stream", headers=headers)

        return await self._handler.infer(
            request,
            endpoint,
            decode,
            encode,
            sizes=(len(received), parsed_bytes(request, received)),
        )

    async def predict_v1(self, request: Request) -> Response:
        """Handle a prediction request of KServe V1."""
        request.protocol = "v1"
        endpoint, received = await self._begin(request)

        def decode() -> InferRequest:
            limits, manifest = self.config.limits, endpoint.plane.manifest
            body = decompress(request, received, limits.max_body_bytes)
            if is_form(request.content_type):
                return self._of_form(request, body, manifest)
            if is_picture(request.content_type):
                return v2.decode(body, "0", manifest, limits.max_rows, is_image=True)
            if len(body) > INLINE_BYTES:
                return self._decode_elsewhere("v1", body, manifest)
            return v1.decode(
                body, manifest, limits.max_rows, limits.max_json_bytes, limits.unknown_fields
            )

        def encode(inference: InferRequest, predictions: Arrays, plane: DataPlane) -> Response:
            named = v2.boolean_parameter(inference.parameters, "named", default=False)
            return Response(v1.encode(predictions, plane.classes if named else None))

        sizes = len(received), parsed_bytes(request, received)
        return await self._handler.infer(request, endpoint, decode, encode, sizes=sizes)

    def _decode_elsewhere(
        self, protocol: str, body: bytes, manifest: Manifest, header_length: str | None = None
    ) -> InferRequest:
        limits = self.config.limits
        return self._json_process.decode(
            protocol,
            body,
            manifest,
            header_length=header_length,
            max_rows=limits.max_rows,
            max_json_bytes=limits.max_json_bytes,
            unknown_fields=limits.unknown_fields,
        )

    def _of_form(self, request: Request, body: bytes, manifest: Manifest) -> InferRequest:
        """Return a request with one record, whose fields are the parts of a form."""
        given: Mapping[str, bytes | str] = form_fields(body, request.content_type)
        names = [tensor.name for tensor in manifest.inputs]
        if len(names) == 1 and len(given) == 1:  # such as a picture: its part may have any name
            given = {names[0]: next(iter(given.values()))}
        given = plain_fields(given, manifest, "the form")
        match_fields(given, manifest, self.config.limits.unknown_fields, "the form")
        return InferRequest(None, {name: [given.get(name)] for name in names})

    async def server(self, request: Request) -> Response:
        """Return the name, version and protocol extensions of the server."""
        return json_response(server_metadata())

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def health(self, request: Request) -> Response:
        """Report whether the server is ready."""
        ready = self._handler.ready()
        return json_response({"ready": ready}, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        """List the model's name, if the key may use the model."""
        return json_response(
            {"models": [self._handler.name] if request.sees(self._handler.name) else []}
        )

    async def model(self, request: Request) -> Response:
        """Return the inputs, outputs and versions of the model."""
        return json_response(model_metadata(self._plane(request), self._handler.versions))

    async def ready(self, request: Request) -> Response:
        """Report that the model is ready; an unloaded model raises Unavailable."""
        return json_response({"name": self._plane(request).name, "ready": True})

    async def model_config(self, request: Request) -> Response:
        return json_response(model_config(self._plane(request), self.config))

    async def stats(self, request: Request) -> Response:
        """Return this replica's request counts, and all replicas' drift, accuracy and rollout."""
        statistics = [model_statistics(self._plane(request))]
        return json_response({"model_stats": statistics, **await self._handler.repository.stats()})

    async def feedback(self, request: Request) -> Response:
        """Record the true labels of an earlier request.

        Raises Forbidden if it names another key's request and this key is not an admin key.
        """
        limits = self.config.limits.max_json_bytes, self.config.limits.body_timeout_s
        given = feedback.decode(await self.body(request, *limits), self.config.limits.max_rows)
        owner = "" if request.key is None else request.key.name
        is_admin = request.key is not None and request.key.admin
        if given.client not in (None, owner) and not is_admin:
            raise Forbidden("feedback for another key's requests needs an admin key (--admin).")
        return json_response(
            await self._handler.repository.feedback(
                request.model,
                owned_id(given.client or owner, given.request_id),
                given.truths,
                request.actor,
                any_owner=given.request_id if is_admin and given.client is None else None,
            )
        )

    async def index(self, request: Request) -> Response:
        """List the model's versions and their states."""
        return json_response(await self._handler.index(request.key))

    async def load(self, request: Request) -> Response:
        """Load the versions that the registry names now."""
        limits = self.config.limits.max_json_bytes, self.config.limits.body_timeout_s
        allow = repository.decode_load(await self.body(request, *limits))
        return json_response(
            await self._handler.repository.load(
                request.model, request.actor, allow_interface_change=allow
            )
        )

    async def unload(self, request: Request) -> Response:
        """Unload the model."""
        await self._handler.repository.unload(request.model, request.actor)
        return json_response({})

    async def prometheus(self, request: Request) -> Response:
        """Return the metrics of all replicas, for the models that the key may use."""
        counted = filter_models(await self._handler.repository.metrics(), request.sees)
        return Response(exposition(counted), content_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        plane = self._handler.endpoint(request.model).plane
        return json_response(openapi.openapi_document(plane.manifest))

    async def docs(self, request: Request) -> Response:
        return html_response(openapi.docs_page(request.path, needs_key=self.guard.keys is not None))

    async def manifest(self, request: Request) -> Response:
        return console.bundle_manifest(self._plane(request))

    async def report(self, request: Request) -> Response:
        """Return a file of the bundle's report."""
        plane, name = self._plane(request), request.path.rpartition("/")[2]
        return await asyncio.to_thread(console.report_file, plane, name)

    def snapshot(self, replica: str) -> Snapshot:
        """Return this replica's metrics. Requests that reached no version have empty labels."""
        none = {"model": "", "version": "", "variant": "", "replica": replica}
        return merge_samples(
            [self._handler.snapshot(replica), self.recorder.metrics.snapshot(none)]
        )

    def _find(self, request: Request) -> Endpoint:
        """Return the endpoint that a path names. Raises NotFound or Unavailable."""
        endpoint = self._handler.endpoint(request.model, request.version)
        request.metrics, request.version = endpoint.plane.metrics, endpoint.plane.version
        return endpoint

    def _plane(self, request: Request) -> DataPlane:
        """Return the data plane that a path names. Raises NotFound or Unavailable."""
        return self._find(request).plane

    async def _begin(self, request: Request) -> tuple[Endpoint, bytes]:
        endpoint = self._find(request)
        limits = self.config.limits
        check_charset(request.content_type)
        return endpoint, await self.body(request, limits.max_body_bytes, limits.body_timeout_s)


def _routes(rest: ModelAPI) -> Routes:
    repository = "/v2/repository/models/(?P<name>[^/]+)"
    return Routes(
        {
            VERSIONED + "/infer": Route(POST, rest.infer_v2, Access.MODEL),
            V1_MODEL + ":predict": Route(POST, rest.predict_v1, Access.MODEL),
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
            "/docs/assets/[^/]+": Route(GET, openapi.docs_file, Access.OPEN),
            VERSIONED + "/manifest": Route(GET, rest.manifest, Access.MODEL),
            VERSIONED + "/report/[^/]+": Route(GET, rest.report, Access.MODEL),
            "/console/[^/]+": Route(GET, console.console_file, Access.OPEN),
            "/": Route(GET, console.console_page, Access.PAGE),
        }
    )
