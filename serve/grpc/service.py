"""The gRPC service inference.GRPCInferenceService, for Ray Serve's gRPC server or a standalone one.

Methods receive serialized messages, so that a malformed message gets a gRPC status like any other
error and Ray's proxy can forward messages without their classes. In a replica, a message is read
only after the API key is checked: each method is registered with a stream of request messages and
reads the first one.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from serve.access import Access
from serve.errors import BadRequest, PayloadTooLarge, RequestError
from serve.grpc import messages
from serve.grpc.call import (
    REQUEST_ID,
    GrpcCall,
    MessageReader,
    add_trailer,
    named_model,
    refuse_call,
    set_status,
)
from serve.grpc.messages import types
from serve.inference.dataplane import DataPlane
from serve.protocol import repository
from serve.protocol.metadata import model_config, model_metadata, model_statistics, server_metadata
from serve.replica.handler import InferenceHandler
from serve.replica.pipeline import Endpoint
from serve.telemetry.recorder import RequestRecorder

logger = logging.getLogger(__name__)

SERVICE = f"{messages.PACKAGE}.GRPCInferenceService"
INFER = "ModelInfer"

HOST = "127.0.0.1"


# Method name → the access that it requires.
ACCESS: dict[str, Access] = {}

Service = TypeVar("Service", bound="InferenceService")

Handler = Callable[[Service, Any, GrpcCall], Awaitable[Any]]

# (service, message or None if it has not been read yet, context) → the response.
Method = Callable[[Service, bytes | None, Any], Awaitable[Any]]


def _method(access: Access) -> Callable[[Handler[Service]], Method[Service]]:
    """Return a decorator that makes a gRPC method of a handler; errors become the call's status."""

    def made(handler: Handler[Service]) -> Method[Service]:
        name = handler.__name__
        request_type = getattr(types, f"{name}Request")
        empty = getattr(types, f"{name}Response")()

        @functools.wraps(handler)
        async def method(self: Service, data: bytes | None, context: Any) -> Any:
            call = GrpcCall(name, context)
            if name == INFER:
                call.protocol = "grpc"
            add_trailer(context, REQUEST_ID, call.id)
            status = 500
            try:
                self.check_key(call, access)
                if data is None:
                    data = await self.reader.read(call, context)
                self.check_size(data)
                request = request_type.FromString(data)
                self.check_scope(call, access, named_model(request))
                response = await handler(self, request, call)
                status = 200
                return response
            except asyncio.CancelledError:
                status = 499
                raise
            except DecodeError:
                error = BadRequest(f"the message cannot be decoded; expected a {name}Request.")
                self.recorder.refuse(call, error.reason)
                status = refuse_call(context, error)
            except RequestError as error:
                self.recorder.refuse(call, error.reason)
                status = refuse_call(context, error)
            except Exception:
                # The log has the traceback; clients receive no internal details.
                logger.exception("gRPC call failed: %s", name)
                message = "the server failed to process this request."
                set_status(context, grpc.StatusCode.INTERNAL, message)
            finally:
                self.recorder.record(call, status)
            return empty

        ACCESS[name] = access
        return method

    return made


class InferenceService:
    """The methods of the service. Those with capitalized names implement the protocol's methods."""

    def __init__(self, handler: InferenceHandler, recorder: RequestRecorder | None = None) -> None:
        self._handler = handler
        self._config = handler.config
        self.recorder = recorder or RequestRecorder()
        limits = self._config.limits
        self.reader = MessageReader(
            limits.max_body_bytes, limits.max_pending_bytes, limits.body_timeout_s
        )

    def check_size(self, data: bytes) -> None:
        """Raise PayloadTooLarge if a message is too large; Ray's servers accept any size."""
        if len(data) > self._config.limits.max_body_bytes:
            raise PayloadTooLarge(
                f"the message has {len(data)} bytes; "
                f"at most {self._config.limits.max_body_bytes} are accepted."
            )

    def check_key(self, call: GrpcCall, access: Access) -> None:
        """Check the call's key and origin. Raises Unauthorized, RateLimited or Forbidden."""
        guard = self._handler.guard
        guard.check_page(call.header, method="POST", access=access)
        if guard.needs_key(access):
            call.key = guard.authenticate(call.metadata.get("authorization"))

    def check_scope(self, call: GrpcCall, access: Access, model: str) -> None:
        """Check that the call's key allows `access`. Raises Forbidden or Unauthorized."""
        call.model = model
        self._handler.guard.authorize(call.key, access, model)

    @_method(Access.OPEN)
    async def ServerLive(self, request: Any, call: GrpcCall) -> Any:
        return types.ServerLiveResponse(live=self._handler.live())

    @_method(Access.OPEN)
    async def ServerReady(self, request: Any, call: GrpcCall) -> Any:
        return types.ServerReadyResponse(ready=self._handler.ready())

    @_method(Access.MODEL)
    async def ModelReady(self, request: Any, call: GrpcCall) -> Any:
        ready = self._handler.ready() and self._plane(request.name, request.version, call)
        return types.ModelReadyResponse(ready=bool(ready))

    @_method(Access.KEY)
    async def ServerMetadata(self, request: Any, call: GrpcCall) -> Any:
        return _parsed(server_metadata(), types.ServerMetadataResponse())

    @_method(Access.MODEL)
    async def ModelMetadata(self, request: Any, call: GrpcCall) -> Any:
        plane = self._plane(request.name, request.version, call)
        metadata = model_metadata(plane, self._handler.versions)
        return _parsed(metadata, types.ModelMetadataResponse())

    @_method(Access.MODEL)
    async def ModelConfig(self, request: Any, call: GrpcCall) -> Any:
        plane = self._plane(request.name, request.version, call)
        config = {"config": model_config(plane, self._config)}
        return _parsed(config, types.ModelConfigResponse())

    @_method(Access.MODEL)
    async def ModelStatistics(self, request: Any, call: GrpcCall) -> Any:
        plane = self._plane(request.name, request.version, call)
        statistics = {"model_stats": [model_statistics(plane)]}
        return _parsed(statistics, types.ModelStatisticsResponse())

    @_method(Access.MODEL)
    async def ModelInfer(self, request: Any, call: GrpcCall) -> Any:
        endpoint = self._find(request.model_name, request.model_version, call)
        manifest, limits = endpoint.plane.manifest, self._config.limits
        return await self._handler.infer(
            call,
            endpoint,
            lambda: messages.decode(request, manifest, limits.max_rows, limits.unknown_fields),
            lambda inference, predictions, plane: messages.encode(
                inference, predictions, plane.manifest, plane.version
            ),
            call.timeout_s,
        )

    @_method(Access.KEY)
    async def RepositoryIndex(self, request: Any, call: GrpcCall) -> Any:
        models = await self._handler.index(call.key)
        if request.ready:
            models = [model for model in models if model["state"] == "READY"]
        return _parsed({"models": models}, types.RepositoryIndexResponse())

    @_method(Access.ADMIN)
    async def RepositoryModelLoad(self, request: Any, call: GrpcCall) -> Any:
        name = named_model(request)
        parameters = {
            key: getattr(value, value.WhichOneof("parameter_choice") or "", None)
            for key, value in request.parameters.items()
        }
        allow = repository.allows_interface_change(parameters)
        await self._handler.repository.load(name, call.actor, allow_interface_change=allow)
        return types.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    @_method(Access.ADMIN)
    async def RepositoryModelUnload(self, request: Any, call: GrpcCall) -> Any:
        name = named_model(request)
        await self._handler.repository.unload(name, call.actor)
        return types.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    def _find(self, name: str, version: str, call: GrpcCall) -> Endpoint:
        """Return the endpoint of a version. Raises NotFound or Unavailable."""
        endpoint = self._handler.endpoint(name, version or None)
        call.metrics, call.version = endpoint.plane.metrics, endpoint.plane.version
        return endpoint

    def _plane(self, name: str, version: str, call: GrpcCall) -> DataPlane:
        """Return the data plane of a version. Raises NotFound or Unavailable."""
        return self._find(name, version, call).plane


METHODS = [name for name in vars(InferenceService) if name[0].isupper()]

# The service of this process. A replica sets it before Ray starts its servers.
local: InferenceService | None = None


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service. Ray's option `grpc_servicer_functions` names this function.

    servicer: handles the calls if `local` is None; Ray's proxy passes itself.
    """
    if local is not None:
        # Otherwise Ray sends each call through its router, which costs more than the prediction.
        server.add_passthrough_service(SERVICE)
    _register(local or servicer, server)


def answers_grpc(deployment: type) -> type:
    """Add the methods that Ray's proxy calls on a replica to a deployment class."""
    for name in METHODS:
        setattr(deployment, name, _forward(name))
    return deployment


async def start_server(
    service: InferenceService, port: int, *, max_message_bytes: int
) -> tuple[grpc.aio.Server, int]:
    """Start a server on loopback. Return the server and its port; port 0 picks a free one."""
    limits = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
    server = grpc.aio.server(options=[(limit, max_message_bytes) for limit in limits])
    _register(service, server)
    bound = server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    return server, bound


def _register(servicer: Any, server: Any) -> None:
    handlers = {}
    for name in METHODS:
        method = getattr(servicer, name)
        if isinstance(servicer, InferenceService):
            handlers[name] = grpc.stream_unary_rpc_method_handler(
                _unread(method), response_serializer=_serialized
            )
        else:  # Ray's proxy
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                method, response_serializer=_serialized
            )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


def _unread(method: Callable[[None, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def of_stream(messages: Any, context: Any) -> Any:
        return await method(None, context)

    return of_stream


def _forward(name: str) -> Callable[..., Awaitable[Any]]:
    # Ray passes its context only to a parameter named grpc_context.
    async def forward(self: Any, data: bytes, grpc_context: Any) -> Any:
        assert local is not None
        return await getattr(local, name)(data, grpc_context)

    forward.__name__ = name
    return forward


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _parsed(values: dict[str, Any], message: Any) -> Any:
    """Fill a message from a dict; keys that the message does not have are ignored."""
    return ParseDict(values, message, ignore_unknown_fields=True)
