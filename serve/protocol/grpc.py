"""gRPC: the service inference.GRPCInferenceService, for a server of Ray Serve's or one of our own.

A method takes the message's bytes: that way what is malformed gets a status like any other error,
and Ray's proxy hands it on without knowing our messages.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from serve.access import Access, Actor, address_of
from serve.accesslog import AccessLog
from serve.dataplane import DataPlane
from serve.errors import BadRequest, BodyTooLarge, RequestError
from serve.host import Host
from serve.metrics import PlaneMetrics
from serve.protocol import describe, grpc_messages
from serve.protocol.grpc_messages import types
from serve.protocol.request import BEHIND_HAPROXY, MAX_ID, new_id
from serve.protocol.request import PEER as HTTP_PEER
from serve.security import Key

logger = logging.getLogger(__name__)

SERVICE = f"{grpc_messages.PACKAGE}.GRPCInferenceService"
INFER = "ModelInfer"
HOST = "127.0.0.1"
REQUEST_ID, RETRY_AFTER, PEER = "x-request-id", "retry-after", HTTP_PEER.decode()
# A message travels in HTTP/2 trailers, for which clients have about 8 KB.
MAX_DETAILS = 500

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    # As gRPC itself answers a message above its limit.
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass
class Call:
    """One call. metrics: of the model that it turns out to be about. peer: whom it is from."""

    id: str
    metadata: dict[str, str]
    timeout_s: float | None
    metrics: PlaneMetrics
    peer: str = ""
    model: str = ""
    key: Key | None = None

    @classmethod
    def of(cls, context: Any, metrics: PlaneMetrics) -> "Call":
        # Ray's own context tells no deadline.
        remaining = getattr(context, "time_remaining", lambda: None)
        metadata = context.invocation_metadata() or ()
        # Of several the first, the one that HAProxy sets.
        words = {key: value for key, value in reversed(metadata) if isinstance(value, str)}
        request_id = words.get(REQUEST_ID, "")[:MAX_ID] or new_id()
        peer = address_of(words.get(PEER) if BEHIND_HAPROXY else None, context.peer() or "")
        return cls(request_id, words, remaining(), metrics, peer)

    @property
    def client(self) -> str:
        return self.key.name if self.key else self.metadata.get("x-client-id", "")

    @property
    def actor(self) -> Actor:
        """Who calls, for the audit log."""
        return Actor(self.client[:100], self.peer[:100], self.id)

    def header(self, name: bytes) -> str | None:
        return self.metadata.get(name.decode())


# What each method needs, by its name.
ACCESS: dict[str, Access] = {}

Service = TypeVar("Service", bound="InferenceService")
Handler = Callable[[Service, Any, Call], Awaitable[Any]]
Method = Callable[[Service, bytes, Any], Awaitable[Any]]


def _method(access: Access) -> Callable[[Handler[Service]], Method[Service]]:
    """Make a method of gRPC of what answers a message; an error becomes the call's status."""

    def made(handler: Handler[Service]) -> Method[Service]:
        name = handler.__name__
        request_type = getattr(types, f"{name}Request")
        empty = getattr(types, f"{name}Response")()

        @functools.wraps(handler)
        async def method(self: Service, data: bytes, context: Any) -> Any:
            began = time.perf_counter()
            call = Call.of(context, self.metrics)
            _trail(context, REQUEST_ID, call.id)
            status = 500
            try:
                self.check_key(call, access)
                self.check_size(data)
                request = request_type.FromString(data)
                self.check_scope(call, access, _model_name(request))
                response = await handler(self, request, call)
                status = 200
                return response
            except asyncio.CancelledError:
                status = 499
                raise
            except DecodeError:
                status = _refuse(context, call, BadRequest(f"the message is not a {name}Request."))
            except RequestError as error:
                status = _refuse(context, call, error)
            except Exception:
                # What went wrong is in the log; a client gets none of the server's insides.
                logger.exception("gRPC call failed: %s", name)
                _set(context, grpc.StatusCode.INTERNAL, "the server failed to answer this request.")
            finally:
                seconds = time.perf_counter() - began
                protocol = "grpc" if name == INFER else "http"
                call.metrics.answered(protocol, status, seconds)
                self.tell(name, call, status, seconds)
            return empty

        ACCESS[name] = access
        return method

    return made


class InferenceService:
    """The methods, by their names in the protocol."""

    def __init__(self, host: Host, metrics: PlaneMetrics, log: AccessLog | None = None) -> None:
        """metrics: count what is about no model."""
        self._host = host
        self._log = log
        self._config = host.config
        self.metrics = metrics

    def check_size(self, data: bytes) -> None:
        """Raises BodyTooLarge: a server of Ray's takes messages of any size."""
        if len(data) > self._config.max_body_bytes:
            raise BodyTooLarge(
                f"the message has {len(data)} bytes; "
                f"at most {self._config.max_body_bytes} are accepted."
            )

    def check_key(self, call: Call, access: Access) -> None:
        """Raises Unauthorized, RateLimited, Forbidden."""
        guard = self._host.guard
        guard.check_page(call.header, method="POST", access=access)
        if guard.needs_key(access):
            call.key = guard.authenticate(call.metadata.get("authorization"))

    def check_scope(self, call: Call, access: Access, model: str) -> None:
        """Raises Forbidden, Unauthorized."""
        call.model = model
        self._host.guard.authorize(call.key, access, model)

    def tell(self, method: str, call: "Call", status: int, seconds: float) -> None:
        """Write the call to the access log."""
        if self._log is not None:
            line = {
                "time": time.time() - seconds,
                "id": call.id,
                "method": "gRPC",
                "path": method,
                "status": status,
                "ms": round(seconds * 1e3, 3),
                "model": call.model[:100],
                "client": call.client[:100],
            }
            self._log.add(status, line)

    @_method(Access.OPEN)
    async def ServerLive(self, request: Any, call: Call) -> Any:
        return types.ServerLiveResponse(live=self._host.live())

    @_method(Access.OPEN)
    async def ServerReady(self, request: Any, call: Call) -> Any:
        return types.ServerReadyResponse(ready=self._host.ready())

    @_method(Access.MODEL)
    async def ModelReady(self, request: Any, call: Call) -> Any:
        self._plane(request.name, request.version, call)
        return types.ModelReadyResponse(ready=True)

    @_method(Access.KEY)
    async def ServerMetadata(self, request: Any, call: Call) -> Any:
        return _parsed(describe.server(), types.ServerMetadataResponse())

    @_method(Access.MODEL)
    async def ModelMetadata(self, request: Any, call: Call) -> Any:
        plane = self._plane(request.name, request.version, call)
        metadata = describe.metadata(plane, self._host.versions)
        return _parsed(metadata, types.ModelMetadataResponse())

    @_method(Access.MODEL)
    async def ModelConfig(self, request: Any, call: Call) -> Any:
        plane = self._plane(request.name, request.version, call)
        config = {"config": describe.config(plane, self._config)}
        return _parsed(config, types.ModelConfigResponse())

    @_method(Access.MODEL)
    async def ModelStatistics(self, request: Any, call: Call) -> Any:
        plane = self._plane(request.name, request.version, call)
        statistics = {"model_stats": [describe.statistics(plane)]}
        return _parsed(statistics, types.ModelStatisticsResponse())

    @_method(Access.MODEL)
    async def ModelInfer(self, request: Any, call: Call) -> Any:
        began = time.perf_counter()
        plane = self._plane(request.model_name, request.model_version, call)
        inference = grpc_messages.decode(request, plane.manifest, self._config.max_rows)
        terms = self._host.terms(inference.parameters, call.client, call.timeout_s)
        plane.metrics.stages["parse"].observe(time.perf_counter() - began)
        answering, predictions = await self._host.infer(
            plane, inference.columns, terms, call.id, named=bool(request.model_version)
        )
        plane, call.metrics = answering, answering.metrics
        replied = time.perf_counter()
        response = grpc_messages.encode(inference, predictions, plane.manifest, plane.version)
        plane.metrics.stages["reply"].observe(time.perf_counter() - replied)
        return response

    @_method(Access.KEY)
    async def RepositoryIndex(self, request: Any, call: Call) -> Any:
        models = await self._host.index(call.key)
        if request.ready:
            models = [model for model in models if model["state"] == "READY"]
        return _parsed({"models": models}, types.RepositoryIndexResponse())

    @_method(Access.ADMIN)
    async def RepositoryModelLoad(self, request: Any, call: Call) -> Any:
        name = _model_name(request)
        if request.parameters:
            raise BadRequest(
                f"load takes no parameters; {', '.join(request.parameters)[:100]} came."
            )
        await self._host.repository.load(name, call.actor)
        return types.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    @_method(Access.ADMIN)
    async def RepositoryModelUnload(self, request: Any, call: Call) -> Any:
        name = _model_name(request)
        await self._host.repository.unload(name, call.actor)
        return types.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    def _plane(self, name: str, version: str, call: Call) -> DataPlane:
        """Raises NotFound, Unavailable."""
        plane = self._host.find(name, version or None)
        call.metrics = plane.metrics
        return plane


METHODS = [name for name in vars(InferenceService) if name[0].isupper()]

# The service of this process. Set by a replica before Ray starts its servers.
local: InferenceService | None = None


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service; Ray's `grpc_servicer_functions` take this by its import path.

    servicer: what answers where there is no `local`; Ray's proxy puts itself in its place.
    """
    if local is not None:
        # Else Ray takes each call by way of its router, which costs more than the answer.
        server.add_passthrough_service(SERVICE)
    _register(local or servicer, server)


def answers_grpc(deployment: type) -> type:
    """Give a deployment the methods that Ray's proxy calls on a replica."""
    for name in METHODS:
        setattr(deployment, name, _forward(name))
    return deployment


async def start(
    service: InferenceService, port: int, *, max_message_bytes: int
) -> tuple[grpc.aio.Server, int]:
    """Serve on this host alone; return the server and its port, a free one for port 0."""
    limits = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
    server = grpc.aio.server(options=[(limit, max_message_bytes) for limit in limits])
    _register(service, server)
    bound = server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    return server, bound


def _register(servicer: Any, server: Any) -> None:
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name), response_serializer=_serialized
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


def _forward(name: str) -> Callable[..., Awaitable[Any]]:
    # Ray passes its context to a parameter of this name only.
    async def forward(self: Any, data: bytes, grpc_context: Any) -> Any:
        assert local is not None
        return await getattr(local, name)(data, grpc_context)

    forward.__name__ = name
    return forward


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _parsed(values: dict[str, Any], message: Any) -> Any:
    """Fill a message with what it has fields for."""
    return ParseDict(values, message, ignore_unknown_fields=True)


def _model_name(request: Any) -> str:
    """The model that a message names; "" where it names none."""
    # KServe's messages of the repository have the model's name where Triton's have another.
    for field in ("model_name", "repository_name", "name"):
        if name := getattr(request, field, ""):
            return str(name)
    return ""


def _refuse(context: Any, call: Call, error: RequestError) -> int:
    call.metrics.refused[error.reason] += 1
    _trail(context, RETRY_AFTER, error.headers.get("Retry-After"))
    _set(context, CODES.get(error.status, grpc.StatusCode.INTERNAL), str(error))
    return error.status


def _set(context: Any, code: grpc.StatusCode, details: str) -> None:
    context.set_code(code)
    context.set_details(details[:MAX_DETAILS])


def _trail(context: Any, name: str, value: str | None) -> None:
    """Add to the trailing metadata."""
    if value is not None:
        context.set_trailing_metadata([*(context.trailing_metadata() or ()), (name, value)])
