"""An HTTP request, with limits on the size and duration of its body and a watch for disconnects."""

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from serve.access import client_address
from serve.errors import ClientDisconnected, Overloaded, PayloadTooLarge, RequestTimeout
from serve.telemetry.recorder import RequestContext

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

T = TypeVar("T")

REQUEST_ID, MAX_ID = b"x-request-id", 128
# HAProxy sets this header to the client's address, and overrides the client's own value.
PEER = b"x-halyard-peer"
BEHIND_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
# Seconds after which a request in progress is watched for a disconnect.
WATCH_AFTER_S = 0.05


def new_request_id() -> str:
    """Return a random id, which cannot be guessed, for a request that has none."""
    return secrets.token_hex(16)


class Request(RequestContext):
    """An HTTP request."""

    __slots__ = ("_headers", "receive", "scope")

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive) -> None:
        self.scope = scope
        self.receive = receive
        # If a header is repeated, the first one counts: HAProxy sets it, and trailers come later.
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        request_id = (self.header(REQUEST_ID) or "")[:MAX_ID] or new_request_id()
        super().__init__(request_id, scope["method"], scope["path"])

    def header(self, name: bytes) -> str | None:
        """Return a header by its name in lower case; None if the request does not have it."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def content_type(self) -> str:
        return self.header(b"content-type") or ""

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode("latin-1"): self.header(name) or "" for name in self._headers}

    @property
    def address(self) -> str:
        """The client's address, from HAProxy if there is one, or else that of the connection."""
        host, _ = self.scope.get("client") or ("", 0)
        return client_address(self.header(PEER) if BEHIND_HAPROXY else None, host)

    def sees(self, model: str) -> bool:
        """Return whether the client may use a model, and so may see its name."""
        return self.key is None or self.key.sees(model)

    async def body(self, max_bytes: int, timeout_s: float, pending: "PendingBodies") -> bytes:
        """Receive the body.

        Raises PayloadTooLarge if it has more than `max_bytes`, Overloaded if `pending` is full,
        RequestTimeout if it does not arrive within `timeout_s`, ClientDisconnected if the client
        disconnects first.
        """
        declared = self._headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > max_bytes:
            raise PayloadTooLarge(
                f"the body has {int(declared[:20])} bytes; at most {max_bytes} are accepted."
            )
        slow = RequestTimeout(f"the body did not arrive within {timeout_s:g} s.")
        with Interruption() as interruption:
            timer = asyncio.get_running_loop().call_later(timeout_s, interruption.raises, slow)
            try:
                return await self._received(max_bytes, pending)
            finally:
                timer.cancel()

    async def _received(self, max_bytes: int, pending: "PendingBodies") -> bytes:
        message = await self.receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            body: bytes = message.get("body", b"")
            if len(body) <= max_bytes:
                return body
        chunks: list[bytes] = []
        received = 0
        try:
            while True:
                received += self._chunk(message, chunks, received, max_bytes)
                pending.add(len(chunks[-1]))
                if not message.get("more_body"):
                    return b"".join(chunks)
                message = await self.receive()
        finally:
            pending.bytes -= received

    def _chunk(
        self, message: MutableMapping[str, Any], chunks: list[bytes], received: int, most: int
    ) -> int:
        """Append the chunk in a message to `chunks`; return its size in bytes."""
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client disconnected before its request was complete.")
        chunk = message.get("body", b"")
        if received + len(chunk) > most:
            raise PayloadTooLarge(f"the body has more than {most} bytes, which is the limit.")
        chunks.append(chunk)
        return len(chunk)

    async def while_connected(self, answer: Awaitable[T]) -> T:
        """Await `answer`. Raises ClientDisconnected if the client disconnects first."""
        with Interruption() as interruption:
            watch: list[asyncio.Task[None]] = []

            async def until_gone() -> None:
                while (await self.receive())["type"] != "http.disconnect":
                    pass
                gone = ClientDisconnected("the client disconnected before the response was ready.")
                interruption.raises(gone)

            loop = asyncio.get_running_loop()
            timer = loop.call_later(
                WATCH_AFTER_S, lambda: watch.append(loop.create_task(until_gone()))
            )
            try:
                return await answer
            finally:
                timer.cancel()
                for each in watch:
                    each.cancel()


class PendingBodies:
    """The total size of the bodies that are being received."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.bytes = 0

    def add(self, size: int) -> None:
        """Add bytes that were received. Raises Overloaded if the total exceeds the limit."""
        self.bytes += size
        if self.bytes > self._max_bytes:
            raise Overloaded("too many large requests are being received.", 1, "pending_bytes")


class Interruption:
    """Lets a callback interrupt the current task within a `with` block by an error.

    This is cheaper than a separate task for each await.
    """

    __slots__ = ("_error", "_task")

    def __enter__(self) -> "Interruption":
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] | None = task
        self._error: Exception | None = None
        return self

    def raises(self, error: Exception) -> None:
        """Cancel what the task awaits; the block then raises `error`. The first call counts."""
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        if self._error is not None and kind is asyncio.CancelledError:
            assert task is not None
            task.uncancel()
            raise self._error from None
