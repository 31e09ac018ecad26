"""HTTP: from an ASGI connection to a request, and from an answer or an error back.

What every route has in common: who asks, how much and how slowly they may send, what an error looks
like, the log and the metrics. Plain ASGI, as this is on the path of every request.
"""

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import orjson

from serve.accesslog import AccessLog
from serve.errors import (
    BadMethod,
    BodyTooLarge,
    ClientGone,
    NotFound,
    Overloaded,
    RequestError,
    SlowBody,
)
from serve.metrics import PlaneMetrics
from serve.security import Key
from serve.tracing import Tracer

logger = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

T = TypeVar("T")

JSON = "application/json"
REQUEST_ID, MAX_ID = b"x-request-id", 128
# Requests that came without an id are told apart by their process and a count.
_PROCESS = secrets.token_hex(6)
_counter = itertools.count(1)
# What is answered without a key: whether the server lives, and how to use it.
OPEN = re.compile(
    r"/|/v2/health/(live|ready)|/docs(/assets/[^/]+)?|/openapi\.json"
    r"|/v2/models/[^/]+/(docs|openapi\.json)"
)
# Whether its client is still there is asked of a request that has not been answered by then.
WATCH_AFTER_S = 0.05


class Request:
    """One request. What it turns out to be about is written into it for the log."""

    __slots__ = (
        *("scope", "receive", "method", "path", "key", "metrics"),
        *("id", "protocol", "model", "version", "rows", "_headers"),
    )

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive) -> None:
        self.scope = scope
        self.receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.key: Key | None = None
        self.metrics: PlaneMetrics | None = None
        self.protocol = "http"
        self.model = ""
        self.version: str | None = None
        self.rows = 0
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.id = (self.header(REQUEST_ID) or "")[:MAX_ID] or f"{_PROCESS}-{next(_counter):x}"

    def header(self, name: bytes) -> str | None:
        """name: in lower case."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode("latin-1"): self.header(name) or "" for name in self._headers}

    @property
    def client(self) -> str:
        """Whose share of the engine it takes: its key's, or what it calls itself."""
        return self.key.name if self.key else self.header(b"x-client-id") or ""

    async def body(self, max_bytes: int, timeout_s: float, pending: "Pending") -> bytes:
        """Raises BodyTooLarge as soon as that is known, Overloaded, SlowBody, ClientGone."""
        declared = self._headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > max_bytes:
            raise BodyTooLarge(
                f"the body has {int(declared[:20])} bytes; at most {max_bytes} are accepted."
            )
        slow = SlowBody(f"the body did not arrive within {timeout_s:g} s.")
        with _Interruption() as interruption:
            timer = asyncio.get_running_loop().call_later(timeout_s, interruption.raises, slow)
            try:
                return await self._received(max_bytes, pending)
            finally:
                timer.cancel()

    async def _received(self, max_bytes: int, pending: "Pending") -> bytes:
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
        """Add what a message brings; return its size."""
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its request was whole.")
        chunk = message.get("body", b"")
        if received + len(chunk) > most:
            raise BodyTooLarge(f"the body has more than {most} bytes; that many are accepted.")
        chunks.append(chunk)
        return len(chunk)

    async def while_connected(self, answer: Awaitable[T]) -> T:
        """Await an answer; it is given up, by ClientGone, when the client is seen to have left."""
        with _Interruption() as interruption:
            watch: list[asyncio.Task[None]] = []

            async def until_gone() -> None:
                while (await self.receive())["type"] != "http.disconnect":
                    pass
                interruption.raises(ClientGone("the client left before it was answered."))

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


class Pending:
    """Memory of the bodies that are arriving."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.bytes = 0

    def add(self, size: int) -> None:
        """Raises Overloaded."""
        self.bytes += size
        if self.bytes > self._max_bytes:
            raise Overloaded("too many large requests are arriving.", 1, "pending_bytes")


class _Interruption:
    """Ends what its task awaits in this block by an error; cheaper than a task for each await."""

    __slots__ = ("_error", "_task")

    def __enter__(self) -> "_Interruption":
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] | None = task
        self._error: Exception | None = None
        return self

    def raises(self, error: Exception) -> None:
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        if self._error is not None and kind is asyncio.CancelledError:
            assert task is not None
            task.uncancel()
            raise self._error from None


@dataclass
class Answer:
    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(orjson.dumps(value), status, headers=headers or {})


def failure(error: RequestError) -> Answer:
    headers = error.headers
    if isinstance(error, BodyTooLarge | SlowBody) or error.reason == "pending_bytes":
        # The rest of the body is not waited for.
        headers = {**headers, "Connection": "close"}
    return json({"error": str(error)}, error.status, headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    """There is nothing to start or stop: a replica has done so before it listens."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


class Http:
    """An ASGI application. A subclass says what answers a path.

    key: Authorization header → whose key it is; raises Unauthorized, RateLimited.
    """

    def __init__(
        self,
        key: Callable[[str | None], Key | None],
        *,
        max_pending_bytes: int,
        log: AccessLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._pending = Pending(max_pending_bytes)
        self.metrics = PlaneMetrics()
        self._key = key
        self._log = log
        self._tracer = tracer

    async def handle(self, request: Request) -> Answer:
        """Answer, or raise RequestError."""
        raise NotImplementedError

    async def body(self, request: Request, max_bytes: int, timeout_s: float) -> bytes:
        """Raises BodyTooLarge as soon as that is known, Overloaded, SlowBody, ClientGone."""
        return await request.body(max_bytes, timeout_s, self._pending)

    def is_open(self, path: str) -> bool:
        """Whether a path is answered without a key."""
        return OPEN.fullmatch(path) is not None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        began_ns, began = time.time_ns(), time.perf_counter()
        request = Request(scope, receive)
        answer = await self._answer(request)
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            (REQUEST_ID, request.id.encode("latin-1")),
            *((name.lower().encode(), value.encode()) for name, value in answer.headers.items()),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        body = b"" if request.method == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})
        self._tell(request, answer, began_ns, time.perf_counter() - began)

    async def _answer(self, request: Request) -> Answer:
        try:
            if not self.is_open(request.path):
                request.key = self._key(request.header(b"authorization"))
            return await self.handle(request)
        except RequestError as error:
            (request.metrics or self.metrics).refused[error.reason] += 1
            return failure(error)
        except Exception:
            # What went wrong is in the log; a client gets none of the server's insides.
            logger.exception("request failed: %s", request.path[:200])
            return json({"error": "the server failed to answer this request."}, 500)

    def _tell(self, request: Request, answer: Answer, began_ns: int, seconds: float) -> None:
        metrics = request.metrics or self.metrics
        metrics.answered(request.protocol, answer.status, seconds)
        if self._log is not None:
            self._log.add(
                answer.status,
                {
                    "time": began_ns / 1e9,
                    "id": request.id,
                    "method": request.method,
                    "path": request.path[:200],
                    "status": answer.status,
                    "ms": round(seconds * 1e3, 3),
                    "model": request.model[:100],
                    "version": request.version and request.version[:100],
                    "rows": request.rows,
                    "client": request.client[:100],
                },
            )
        if self._tracer is not None:
            self._tracer.request(
                f"{request.method} {request.protocol}",
                request.headers,
                began_ns,
                began_ns + int(seconds * 1e9),
                {
                    "http.request.method": request.method,
                    "http.response.status_code": answer.status,
                    "url.path": request.path[:200],
                    "halyard.model": request.model[:100],
                    "halyard.version": (request.version or "")[:100],
                    "halyard.rows": request.rows,
                },
            )


def html(page: str) -> Answer:
    return Answer(page.encode(), content_type="text/html; charset=utf-8")


Handler = Callable[[Request], Awaitable[Answer]]
GET, POST = ("GET", "HEAD"), ("POST",)
# The longest path whose handler is remembered.
MAX_KNOWN = 256


class Routes:
    """Which handler answers a path. Patterns name the parts of a path that handlers need."""

    def __init__(self, handlers: Mapping[str, tuple[tuple[str, ...], Handler]]) -> None:
        """handlers: pattern of the whole path → methods, handler."""
        self._routes = [(re.compile(pattern), *route) for pattern, route in handlers.items()]
        self._known = lru_cache(1024)(self._find)

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str | None]]:
        """Return the handler and the named parts. Raises NotFound, or BadMethod."""
        # Clients choose paths: only a bounded memory of them is kept.
        return (self._known if len(path) <= MAX_KNOWN else self._find)(method, path)

    def _find(self, method: str, path: str) -> tuple[Handler, dict[str, str | None]]:
        allowed: list[str] = []
        for pattern, methods, handler in self._routes:
            if match := pattern.fullmatch(path):
                if method in methods:
                    return handler, match.groupdict()
                allowed.extend(methods)
        if allowed:
            raise BadMethod(f"{method} {path[:200]}: expected {' or '.join(allowed)}.", allowed)
        raise NotFound(f"{method} {path[:200]}: there is nothing here. See /docs.")
