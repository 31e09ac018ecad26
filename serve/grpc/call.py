"""A gRPC call: who asks, what it may do, and how an error is answered."""

from typing import Any

import grpc

from serve.access import client_address
from serve.errors import RequestError
from serve.http.request import BEHIND_HAPROXY, MAX_ID, new_request_id
from serve.http.request import PEER as HTTP_PEER
from serve.telemetry.recorder import RequestContext

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


class GrpcCall(RequestContext):
    """A request by gRPC. timeout_s: time left of the client's deadline, None without one."""

    __slots__ = ("_peer", "metadata", "timeout_s")

    def __init__(self, method: str, context: Any) -> None:
        metadata = context.invocation_metadata() or ()
        # Of several the first, the one that HAProxy sets.
        self.metadata = {key: value for key, value in reversed(metadata) if isinstance(value, str)}
        # Ray's own context has no deadline.
        self.timeout_s: float | None = getattr(context, "time_remaining", lambda: None)()
        self._peer: str = context.peer() or ""
        request_id = self.metadata.get(REQUEST_ID, "")[:MAX_ID] or new_request_id()
        super().__init__(request_id, "gRPC", method)

    @property
    def headers(self) -> dict[str, str]:
        return self.metadata

    def header(self, name: bytes) -> str | None:
        return self.metadata.get(name.decode())

    @property
    def address(self) -> str:
        return client_address(self.metadata.get(PEER) if BEHIND_HAPROXY else None, self._peer)


def named_model(request: Any) -> str:
    """The model that a message names; "" where it names none."""
    # KServe's messages of the repository have the model's name where Triton's have another.
    for field in ("model_name", "repository_name", "name"):
        if name := getattr(request, field, ""):
            return str(name)
    return ""


def refuse_call(context: Any, error: RequestError) -> int:
    """Set the status of a call that is refused; return that of HTTP."""
    add_trailer(context, RETRY_AFTER, error.headers.get("Retry-After"))
    set_status(context, CODES.get(error.status, grpc.StatusCode.INTERNAL), str(error))
    return error.status


def set_status(context: Any, code: grpc.StatusCode, details: str) -> None:
    context.set_code(code)
    context.set_details(details[:MAX_DETAILS])


def add_trailer(context: Any, name: str, value: str | None) -> None:
    """Add to the trailing metadata."""
    if value is not None:
        context.set_trailing_metadata([*(context.trailing_metadata() or ()), (name, value)])
