"""The load test's client: one event loop that sends prepared bytes over plain connections.

The client may share the machine with the server that it measures, so it does little per request:
httptools parses responses, and a finished request is one tuple in a list.
"""

import asyncio
import gc
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import httptools

from serve.loadtest.load import Load, create_pacer
from serve.loadtest.report import Done, LoadTestReport, Outcome, classify
from serve.loadtest.target import LoadTarget

new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
try:
    import uvloop

    new_loop = uvloop.new_event_loop
except ImportError:  # uvloop does not exist for Windows; asyncio's loop is slower
    pass

# Interval of the search for requests that have timed out.
TICK_S = 0.1
# Delay before a retry: BACKOFF_S, doubled with each retry up to MAX_BACKOFF_S, and at least the
# response's Retry-After, up to MAX_RETRY_AFTER_S.
BACKOFF_S, MAX_BACKOFF_S, MAX_RETRY_AFTER_S = 0.1, 2.0, 5.0

clock = time.monotonic


def run_load(
    target: LoadTarget,
    load: Load,
    *,
    warmup_s: float = 3,
    duration_s: float = 10,
    timeout_s: float = 10,
    retries: int = 0,
    seed: int = 0,
) -> LoadTestReport:
    """Send load to a server and return what was measured after the warm-up.

    timeout_s: limit for a request, including its wait and its retries; so the run takes at most
    warmup_s + duration_s + timeout_s. retries: maximum retries of a request after a failed
    connection or a 503.
    """
    with asyncio.Runner(loop_factory=new_loop) as runner, pause_gc():
        client = _Client(target, load, timeout_s, retries)
        cpu_s = time.process_time()
        start_s = runner.run(client.run(warmup_s, duration_s, seed))
        cpu_s = time.process_time() - cpu_s
    return LoadTestReport.of(
        client.done,
        load=str(load),
        start_s=start_s + warmup_s,
        duration_s=duration_s,
        lags_s=client.lags_s,
        connections_opened=client.num_opened,
        client_cpu_s=cpu_s,
    )


@contextmanager
def pause_gc() -> Iterator[None]:
    """Disable garbage collection of cycles, which would delay requests by tens of milliseconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Job:
    """One request in progress.

    due_s: when it is to be sent, by `clock`. retries: how often it was retried.
    """

    __slots__ = ("due_s", "request", "retries")

    def __init__(self, due_s: float, request: bytes) -> None:
        self.due_s, self.request, self.retries = due_s, request, 0


class _Connection(asyncio.Protocol):
    """One connection, with at most one request on it."""

    __slots__ = ("_client", "_parser", "_retry_after", "job", "transport")

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._retry_after: bytes | None = None
        self.job: _Job | None = None
        self.transport: asyncio.Transport

    def send(self, job: _Job) -> None:
        self.job = job
        self.transport.write(job.request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Cast, not asserted: uvloop's transports do not inherit from asyncio's classes.
        self.transport = cast(asyncio.Transport, transport)
        self._client.connected(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug in this module
        except httptools.HttpParserError:
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value

    def on_message_complete(self) -> None:
        job, self.job = self.job, None
        if job is None:  # a response without a request: servers send one before they close
            self.transport.abort()
            return
        retry_after, self._retry_after = self._retry_after, None
        if self._parser.should_keep_alive():
            self._client.free(self)
        else:
            self.transport.close()
        self._client.answered(job, self._parser.get_status_code(), retry_after)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self)


class _Client:
    """Sends the requests of a load over as many connections as it needs and may open."""

    def __init__(self, target: LoadTarget, load: Load, timeout_s: float, retries: int) -> None:
        self._target, self._load = target, load
        self._timeout_s, self._retries = timeout_s, retries
        self.done: list[Done] = []
        self.lags_s: list[float] = []
        self.num_opened = 0
        self._num_sent = 0
        self._connections: set[_Connection] = set()
        # Used as a stack, so that few connections stay busy and the server closes the others.
        self._idle: dict[_Connection, None] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[_Job] = deque()

    async def run(self, warmup_s: float, duration_s: float, seed: int) -> float:
        """Run the load and wait for the last outcome; return the time of the start."""
        self._loop = asyncio.get_running_loop()
        self._address, self._tls = self._target.address, self._target.tls
        ended = asyncio.Event()
        start_s = clock()
        self._pacer = create_pacer(
            self._load, start_s, warmup_s, duration_s, seed, self._send, ended.set
        )
        ticker = self._loop.create_task(self._expire())
        try:
            self._pacer.start()
            await ended.wait()
        finally:
            self.lags_s = self._pacer.lags_s
            self._pacer.close()
            self._waiting.clear()
            for task in (ticker, *self._opening):
                task.cancel()
            for connection in self._connections:
                connection.transport.abort()
        return start_s

    def _send(self, due_s: float) -> None:
        requests = self._target.requests
        job = _Job(due_s, requests[self._num_sent % len(requests)])
        self._num_sent += 1
        self._submit(job)

    def _submit(self, job: _Job) -> None:
        if self._idle:
            self._idle.popitem()[0].send(job)
        else:
            self._waiting.append(job)
            self._grow()

    def _grow(self) -> None:
        """Open connections for waiting requests, up to the load's maximum."""
        room = self._load.connections - len(self._connections) - len(self._opening)
        for _ in range(min(room, len(self._waiting) - len(self._opening))):
            task = self._loop.create_task(self._open())
            self._opening.add(task)

    async def _open(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._loop.create_connection(
                    lambda: _Connection(self), *self._address, ssl=self._tls
                )
        except OSError:
            self._opening.discard(task)
            if self._waiting:
                self._failed(self._waiting.popleft())
            self._grow()
        finally:
            self._opening.discard(task)

    def connected(self, connection: _Connection) -> None:
        self.num_opened += 1
        self._connections.add(connection)
        self.free(connection)

    def free(self, connection: _Connection) -> None:
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle[connection] = None

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)
        job, connection.job = connection.job, None
        if job is not None:
            self._failed(job)
        self._grow()

    def answered(self, job: _Job, status: int, retry_after: bytes | None) -> None:
        if status != 503 or not self._try_again(job, retry_after):
            self._finish(job, classify(status), retry_after is not None)

    def _failed(self, job: _Job) -> None:
        if not self._try_again(job, None):
            self._finish(job, Outcome.CONNECTION_ERROR)

    def _try_again(self, job: _Job, retry_after: bytes | None) -> bool:
        """Schedule a retry; return False if no retry or no time is left for one."""
        if job.retries == self._retries:
            return False
        delay_s = min(BACKOFF_S * 2**job.retries, MAX_BACKOFF_S)
        # Jitter, so that requests that were refused together do not return together.
        delay_s *= random.uniform(0.5, 1)
        if retry_after is not None and retry_after.isdigit():
            delay_s = max(delay_s, min(int(retry_after), MAX_RETRY_AFTER_S))
        if clock() + delay_s > job.due_s + self._timeout_s:
            return False
        job.retries += 1
        self._loop.call_later(delay_s, self._submit, job)
        return True

    def _finish(self, job: _Job, outcome: Outcome, retry_after: bool = False) -> None:
        self.done.append((job.due_s, clock(), outcome, retry_after, job.retries))
        self._pacer.finished(outcome)

    async def _expire(self) -> None:
        """End requests that have timed out, for as long as the load runs."""
        while True:
            await asyncio.sleep(min(TICK_S, self._timeout_s / 20))
            oldest_s = clock() - self._timeout_s
            for connection in list(self._connections):
                job = connection.job
                if job is not None and job.due_s < oldest_s:
                    # Its response may still arrive, so no other request can use this connection.
                    connection.job = None
                    connection.transport.abort()
                    self._finish(job, Outcome.TIMEOUT)
            # The queue is not ordered by due time: retries are appended behind later requests.
            late = [job for job in self._waiting if job.due_s < oldest_s]
            if late:
                self._waiting = deque(job for job in self._waiting if job.due_s >= oldest_s)
            for job in late:
                self._finish(job, Outcome.TIMEOUT)
