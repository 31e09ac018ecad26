"""The batcher: requests are joined to a batch when the engine becomes free, never before.

A batch that is formed while the engine is busy only waits, and under load many small batches queue
up. Forming it at the last moment lets batches grow with the load.

A short batch runs on the event loop itself: passing the GIL between two threads for every batch
costs more than the loop gains (a third of the throughput, with batches of 2 ms). A long batch runs
in a thread, so that it does not block the loop.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from serve.errors import DeadlineExceeded, Overloaded
from serve.inference.admission import MARGIN, AdmissionController, FairQueue, RequestOptions
from serve.inference.latency_model import LatencyModel
from serve.telemetry.metrics import VersionMetrics
from train.tasks import Arrays
from train.values.records import concatenate, num_rows

# Longest batch, in seconds, that runs on the event loop.
SHORT_S = 0.01


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request in the queue. Several batches may each take some of its rows."""

    rows: Arrays
    count: int
    terms: RequestOptions
    answer: asyncio.Future[Arrays]
    entered: float
    taken: int = 0
    parts: list[Arrays] = field(default_factory=list)

    @property
    def rows_left(self) -> int:
        return self.count - self.taken

    @property
    def gone(self) -> bool:
        return self.answer.done()

    def refuse(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def drop(self) -> int:
        rows, self.count = self.rows_left, self.taken
        if rows:
            self.rows, self.parts = {}, []
        return rows

    def give(self, part: Arrays) -> None:
        """Add outputs of the next rows, of shape [rows, …]; the last ones complete the request."""
        self.parts.append(part)
        if not self.answer.done() and sum(map(num_rows, self.parts)) == self.count:
            self.answer.set_result(concatenate(self.parts))


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """Some rows of one request, in a batch."""

    job: QueuedRequest
    start: int
    stop: int

    @property
    def rows(self) -> Arrays:
        """The inputs of these rows, each of shape [stop - start, …]."""
        job = self.job
        if self.stop - self.start == job.count:
            return job.rows
        return {name: array[self.start : self.stop] for name, array in job.rows.items()}


class Batcher:
    """Runs one batch at a time. Belongs to one event loop."""

    def __init__(
        self,
        run: Callable[[Arrays], Arrays],
        profile: LatencyModel,
        *,
        max_batch_rows: int | None = None,
        max_queue_rows: int = 1024,
        wait_s: float = 0,
        metrics: VersionMetrics | None = None,
    ) -> None:
        """Set up an idle engine.

        run: computes the outputs of a batch, one row per input row. max_batch_rows: the profile's
        best size if None. wait_s: seconds that an idle engine waits for a batch to fill.
        """
        self._run = run
        self._profile = profile
        self._max_batch_rows = max_batch_rows or profile.best_rows
        self._wait_s = wait_s
        self._metrics = metrics or VersionMetrics()
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._admission = AdmissionController(self._queue, profile, max_queue_rows)
        # Rows that are being encoded and not in the queue yet. The data plane updates it.
        self.encoding_rows = 0
        self._running_rows = 0
        self._busy_until = self._sealed = 0.0
        self._due: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def rows(self) -> int:
        """Rows in progress: waiting rows and those of the running batch."""
        return self.waiting_rows + self._running_rows

    @property
    def running_s(self) -> float:
        """Seconds since the running batch was formed; 0 if none runs."""
        return time.perf_counter() - self._sealed if self._running_rows else 0.0

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue and rows that are being encoded."""
        return self._queue.rows + self.encoding_rows

    @property
    def max_batch_rows(self) -> int:
        return self._max_batch_rows

    def check(self, count: int, terms: RequestOptions) -> list[QueuedRequest]:
        """Return the jobs that `submit` would evict for a request of `count` rows.

        Raises Overloaded if `submit` would reject the request.
        """
        return self._admission.admit(
            terms,
            count,
            now=asyncio.get_running_loop().time(),
            busy_until=self._busy_until,
            batch=self._max_batch_rows,
            encoding_rows=self.encoding_rows,
        )

    def submit(self, rows: Arrays, terms: RequestOptions) -> asyncio.Future[Arrays]:
        """Queue inputs, and return a future of their outputs. Batches are shared with other jobs.

        rows: input → array of shape [N, …]; the outputs are arrays of shape [N, …]. Cancel the
        future to leave the queue. The future fails with DeadlineExceeded at the deadline. Raises
        Overloaded if the outputs cannot be ready by the deadline, or if the queue is full.
        """
        loop = asyncio.get_running_loop()
        count = num_rows(rows)
        for other in self.check(count, terms):
            self._refuse(other, self._admission.full())
        job = QueuedRequest(rows, count, terms, loop.create_future(), time.perf_counter())
        timer = loop.call_at(terms.deadline, self._expire, job)

        def leave(_: asyncio.Future[Arrays]) -> None:
            timer.cancel()
            self._queue.leave(job)

        job.answer.add_done_callback(leave)
        self._queue.push(job)
        self._wake()
        return job.answer

    def _refuse(self, job: QueuedRequest, error: Exception) -> None:
        job.refuse(error)
        self._queue.leave(job)

    def _expire(self, job: QueuedRequest) -> None:
        late = DeadlineExceeded(
            "the request did not finish in time and was cancelled.", self._profile.seconds(1)
        )
        self._refuse(job, late)

    def _wake(self) -> None:
        """Form a batch once the requests that have already arrived are in the queue."""
        if self._due is None and not self._running_rows:
            self._due = asyncio.get_running_loop().call_soon(self._seal)

    def _seal(self, *, filled: bool = False) -> None:
        """Start the next batch if the engine is idle, unless the batch should fill up first."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        first = self._queue.first()
        if self._running_rows or first is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        left_s = first.terms.deadline - now
        if self._wait_s and not filled and self._queue.rows < self._max_batch_rows:
            # Wait until the batch is full, wait_s is over, or the first request has no slack: only
            # twice the duration of the batch is left until its deadline.
            slack_s = left_s - 2 * MARGIN * self._profile.seconds(self._queue.rows)
            wait_s = min(first.entered + self._wait_s - time.perf_counter(), slack_s)
            if wait_s > 0:
                self._timer = loop.call_later(wait_s, self._waited)
                return
        most = self._profile.rows_within(left_s / MARGIN, self._max_batch_rows)
        batch = self._take(most, now)
        if batch:
            self._begin(batch, now)

    def _waited(self) -> None:
        self._seal(filled=True)

    def _begin(self, batch: list[BatchSlice], now: float) -> None:
        rows = self._running_rows = sum(piece.stop - piece.start for piece in batch)
        expected_s = self._profile.seconds(rows)
        self._busy_until = now + expected_s
        sealed = self._sealed = time.perf_counter()
        self._metrics.sealed(rows, [sealed - piece.job.entered for piece in batch])
        if expected_s <= SHORT_S:
            self._finish(batch, sealed, self._compute(batch))
            return
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, batch)
        done.add_done_callback(lambda future: self._finish(batch, sealed, future.result()))

    def _take(self, most: int, now: float) -> list[BatchSlice]:
        """Take up to `most` rows from the queue; reject jobs that cannot finish in time."""
        batch: list[BatchSlice] = []
        while most and (job := self._queue.first()):
            own_s = MARGIN * self._profile.seconds(min(job.rows_left, most))
            alone = not batch and self._queue.rows == job.rows_left
            if now + own_s > job.terms.deadline and not alone:
                late = "the request waited too long behind others to finish in time."
                self._refuse(job, Overloaded(late, own_s, "deadline"))
                continue
            rows = min(job.rows_left, most)
            self._queue.took(rows)
            batch.append(BatchSlice(job, job.taken, job.taken + rows))
            job.taken += rows
            most -= rows
        return batch

    def _compute(
        self, batch: Sequence[BatchSlice]
    ) -> tuple[list[Arrays | Exception], float, float]:
        """Return an outcome for each slice, the start time and the duration in seconds."""
        started = time.perf_counter()
        outcomes = self._outcomes(batch)
        return outcomes, started, time.perf_counter() - started

    def _outcomes(self, batch: Sequence[BatchSlice]) -> list[Arrays | Exception]:
        """Run a batch; if it fails, run its halves, so that only slices at fault get the error."""
        try:
            answers = self._run(concatenate([piece.rows for piece in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            middle = len(batch) // 2
            return self._outcomes(batch[:middle]) + self._outcomes(batch[middle:])
        outcomes: list[Arrays | Exception] = []
        start = 0
        for piece in batch:
            stop = start + piece.stop - piece.start
            outcomes.append({name: array[start:stop] for name, array in answers.items()})
            start = stop
        return outcomes

    def _finish(
        self,
        batch: Sequence[BatchSlice],
        sealed: float,
        result: tuple[list[Arrays | Exception], float, float],
    ) -> None:
        outcomes, started, engine_s = result
        if not any(isinstance(outcome, Exception) for outcome in outcomes):
            # The duration of a failed batch is not typical.
            self._profile.observe(self._running_rows, engine_s)
        self._metrics.ran(started - sealed, engine_s, len(batch))
        self._running_rows, self._busy_until = 0, 0.0
        if engine_s > SHORT_S:
            # Start the engine first, so that it runs while the responses are sent.
            self._wake()
        for piece, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                piece.job.refuse(outcome)
            else:
                piece.job.give(outcome)
        self._wake()
