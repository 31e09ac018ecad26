"""A gRPC call: its metadata, the reading of its message, and the status of its response."""

import asyncio
from collections import Counter
from typing import Any

import grpc

from serve.access import client_address
from serve.errors import BadRequest, RequestError, RequestTimeout
from serve.http.request import BEHIND_HAPROXY, MAX_ID, Interruption, new_request_id
from serve.http.request import PEER as HTTP_PEER
from serve.telemetry.recorder import RequestContext

REQUEST_ID, RETRY_AFTER, PEER = "x-request-id", "retry-after", HTTP_PEER.decode()


# Maximum length of an error message, in characters. It is sent in HTTP/2 trailers, which clients
# limit to about 8 KB.
MAX_DETAILS = 500

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    # The status that gRPC itself uses for a message above its size limit.
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class GrpcCall(RequestContext):
    """A gRPC request.

    timeout_s: seconds until the client's deadline; None if the client set none.
    """

    __slots__ = ("_peer", "metadata", "timeout_s")

    def __init__(self, method: str, context: Any) -> None:
        metadata = context.invocation_metadata() or ()
        # If a key is repeated, its first value counts: that is the one that HAProxy sets.
        self.metadata = {key: value for key, value in reversed(metadata) if isinstance(value, str)}
        # The context of Ray's proxy has no deadline.
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
        """The client's address, from HAProxy if there is one, or else gRPC's peer."""
        return client_address(self.metadata.get(PEER) if BEHIND_HAPROXY else None, self._peer)


class MessageReader:
    """Reads the messages of calls, a few at a time, because each may have the maximum size.

    One client address gets at most half of the slots, so that a client with slow or large messages
    does not block the others.
    """

    def __init__(self, max_bytes: int, max_pending_bytes: int, timeout_s: float) -> None:
        """Set the limits.

        max_bytes: of one message. max_pending_bytes: of all messages that arrive at the same time.
        timeout_s: seconds for a call to get a slot and for its message to arrive.
        """
        self._most = max(max_pending_bytes // max_bytes, 2)
        self._arriving: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._timeout_s = timeout_s

    async def read(self, call: GrpcCall, context: Any) -> bytes:
        """Return the call's message.

        Raises RequestTimeout if the message does not arrive in time, BadRequest if there is none.
        """
        address = _host(call.address)
        loop = asyncio.get_running_loop()
        slow = RequestTimeout(f"the message did not arrive within {self._timeout_s:g} s.")
        with Interruption() as interruption:
            timer = loop.call_later(self._timeout_s, interruption.raises, slow)
            try:
                if self._has_place(address):
                    self._arriving[address] += 1
                else:
                    await self._wait(address)
                try:
                    message = await context.read()
                finally:
                    self._leave(address)
            finally:
                timer.cancel()
        if not isinstance(message, bytes):  # grpc.aio.EOF
            raise BadRequest("the call has no message; expected one.")
        return message

    def _has_place(self, address: str) -> bool:
        full = self._arriving.total() >= self._most
        return not full and self._arriving[address] < self._most // 2

    async def _wait(self, address: str) -> None:
        place = asyncio.get_running_loop().create_future()
        entry = (address, place)
        self._waiting.append(entry)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave(address)
            raise
        finally:
            self._waiting.remove(entry)

    def _leave(self, address: str) -> None:
        """Free a slot and assign it to the first waiting call whose address may have it."""
        self._arriving[address] -= 1
        if not self._arriving[address]:
            del self._arriving[address]
        for waiting, place in self._waiting:
            if not place.done() and self._has_place(waiting):
                self._arriving[waiting] += 1
                place.set_result(None)
                return


def _host(peer: str) -> str:
    """Return the address in a gRPC peer, such as ipv4:127.0.0.1:1234."""
    kind, _, place = peer.partition(":")
    return place.rpartition(":")[0] if kind in ("ipv4", "ipv6") else peer


def named_model(request: Any) -> str:
    """Return the model that a message names; "" if it names none."""
    # Field 1 of the load and unload messages is repository_name in Triton's protocol, which is
    # compiled here, but the model's name in KServe's.
    for field in ("model_name", "repository_name", "name"):
        if name := getattr(request, field, ""):
            return str(name)
    return ""


def refuse_call(context: Any, error: RequestError) -> int:
    """Set the gRPC status of a rejected call; return the corresponding HTTP status."""
    add_trailer(context, RETRY_AFTER, error.headers.get("Retry-After"))
    set_status(context, CODES.get(error.status, grpc.StatusCode.INTERNAL), str(error))
    return error.status


def set_status(context: Any, code: grpc.StatusCode, details: str) -> None:
    """Set the status of a call; details are cut to MAX_DETAILS characters."""
    context.set_code(code)
    context.set_details(details[:MAX_DETAILS])


def add_trailer(context: Any, name: str, value: str | None) -> None:
    """Add an entry to the trailing metadata, unless its value is None."""
    if value is not None:
        context.set_trailing_metadata([*(context.trailing_metadata() or ()), (name, value)])
