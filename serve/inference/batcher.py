"""The batcher: requests are joined to a batch when the engine becomes free, never before.

A batch that is formed while the engine is busy only waits, and under load many small batches queue
up. Forming it at the last moment lets batches grow with the load.

A short batch runs on the event loop itself: passing the GIL between two threads for every batch
costs more than the loop gains (a third of the throughput, with batches of 2 ms). A long batch runs
in a thread, so that it does not block the loop.

Where rows differ in length, a batch holds neighbours in length, because the rows of a batch are
padded to the longest.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from serve.errors import DeadlineExceeded, Overloaded
from serve.inference.admission import MARGIN, AdmissionController
from serve.inference.fair_queue import FairQueue
from serve.inference.latency_model import LatencyModel, LengthModel
from serve.inference.queued_request import BatchSlice, QueuedRequest
from serve.inference.request_options import RequestOptions
from serve.telemetry.metrics import VersionMetrics
from train.tasks import Arrays
from train.values.records import concatenate

# Longest batch, in seconds, that runs on the event loop.
SHORT_S = 0.01
# Most waiting rows that are compared in length to form a batch.
MOST_COMPARED = 64


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
        lists: Collection[str] = (),
        by_length: bool = True,
    ) -> None:
        """Set up an idle engine.

        run: computes the outputs of a batch, one row per input row. max_batch_rows: the profile's
        best size if None. wait_s: seconds that an idle engine waits for a batch to fill. lists:
        names of the inputs whose rows differ in length. by_length: whether batches of them hold
        neighbours in length, rather than in order of arrival.
        """
        self._run = run
        self._profile = profile
        self.max_batch_rows = max_batch_rows or profile.best_rows
        self._wait_s = wait_s
        self._metrics = metrics or VersionMetrics()
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._admission = AdmissionController(self._queue, profile, max_queue_rows)
        # Rows that are being encoded and not in the queue yet. The data plane updates it.
        self.encoding_rows = 0
        self._lists, self._by_length = frozenset(lists), by_length and bool(lists)
        self._running_rows = 0
        self._running_work = 0
        self._busy_until = self._sealed = 0.0
        self._due: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def rows(self) -> int:
        """Rows in progress: waiting rows and those of the running batch."""
        return self.waiting_rows + self._running_rows

    @property
    def load(self) -> float:
        """Work in progress, as the number of rows of the median length."""
        row = self._profile.work()
        return (self._queue.work + self._running_work) / row + self.encoding_rows

    @property
    def running_s(self) -> float:
        """Seconds since the running batch was formed; 0 if none runs."""
        return time.perf_counter() - self._sealed if self._running_rows else 0.0

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue and rows that are being encoded."""
        return self._queue.rows + self.encoding_rows

    def check(
        self, count: int, terms: RequestOptions, lengths: Sequence[int] | None = None
    ) -> list[QueuedRequest]:
        """Return the jobs that `submit` would evict for a request of `count` rows.

        lengths: of the rows, if they differ and are known already. Raises Overloaded if `submit`
        would reject the request.
        """
        return self._admission.admit(
            terms,
            count,
            now=asyncio.get_running_loop().time(),
            busy_until=self._busy_until,
            batch=self.max_batch_rows,
            encoding_rows=self.encoding_rows,
            lengths=lengths,
        )

    def submit(self, rows: Arrays, terms: RequestOptions) -> asyncio.Future[Arrays]:
        """Queue inputs, and return a future of their outputs. Batches are shared with other jobs.

        rows: input → array of shape [N, …]; the outputs are arrays of shape [N, …]. Cancel the
        future to leave the queue. The future fails with DeadlineExceeded at the deadline. Raises
        Overloaded if the outputs cannot be ready by the deadline, or if the queue is full.
        """
        loop = asyncio.get_running_loop()
        job = QueuedRequest.of(rows, terms, self._lists, self._profile)
        job.delay = job.delay if self._by_length else 0
        for other in self.check(job.count, terms, job.lengths):
            self._refuse(other, self._admission.full())
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
        if self._wait_s and not filled and self._queue.rows < self.max_batch_rows:
            # Wait until the batch is full, wait_s is over, or the first request has no slack: only
            # twice the duration of the batch is left until its deadline.
            slack_s = left_s - 2 * MARGIN * self._profile.seconds(self._queue.rows)
            wait_s = min(first.entered + self._wait_s - time.perf_counter(), slack_s)
            if wait_s > 0:
                self._timer = loop.call_later(wait_s, self._waited)
                return
        batch = self._take_neighbours(now) if self._by_length else self._take(left_s, now)
        if batch:
            self._begin(batch, now)

    def _waited(self) -> None:
        self._seal(filled=True)

    def _begin(self, batch: list[BatchSlice], now: float) -> None:
        rows = self._running_rows = sum(piece.stop - piece.start for piece in batch)
        length = max((piece.length for piece in batch if piece.length), default=None)
        self._running_work = rows * self._profile.work(length)
        if length is not None:
            self._metrics.padded(sum(piece.values for piece in batch), rows * length)
        expected_s = self._profile.seconds(rows, length)
        self._busy_until = now + expected_s
        sealed = self._sealed = time.perf_counter()
        self._metrics.sealed(rows, [sealed - piece.job.entered for piece in batch])
        if expected_s <= SHORT_S:
            self._finish(batch, length, sealed, self._compute(batch))
            return
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, batch)
        done.add_done_callback(lambda future: self._finish(batch, length, sealed, future.result()))

    def _take(self, left_s: float, now: float) -> list[BatchSlice]:
        """Take rows from the queue, up to those that finish in `left_s` seconds."""
        most = self._profile.rows_within(left_s / MARGIN, self.max_batch_rows)
        batch: list[BatchSlice] = []
        while most and (job := self._first_in_time(now, most, alone=not batch)):
            batch.append(self._taken(job, min(job.rows_left, most)))
            most -= batch[-1].stop - batch[-1].start
        return batch

    def _take_neighbours(self, now: float) -> list[BatchSlice]:
        """Take rows of about equal length from the queue, the first job's next row among them."""
        profile = self._profile
        assert isinstance(profile, LengthModel)
        first = self._first_in_time(now, 1, alone=True)
        if first is None:
            return []
        jobs = self._queue.waiting(MOST_COMPARED)
        if len(jobs) == first.rows_left == 1:
            return [self._taken(first, 1)]
        # A waiting row is its length, the number of its job, and its place among the job's rows.
        rows = [
            (length, number, place)
            for number, job in enumerate(jobs)
            for place, length in enumerate(job.lengths[job.taken :][:MOST_COMPARED])
        ]
        rows.sort()
        anchor = next(at for at, (_, number, place) in enumerate(rows) if not number and not place)
        lengths = [length for length, _, _ in rows]
        limit_s = (first.terms.deadline - now) / MARGIN
        window = rows[profile.best_window(lengths, anchor, self.max_batch_rows, limit_s)]
        # A job gives its next rows. If the next one is too short for the batch, the job waits.
        begun = {number for _, number, place in window if not place}
        counts = Counter(number for _, number, _ in window if number in begun)
        return [self._taken(jobs[number], count) for number, count in sorted(counts.items())]

    def _first_in_time(self, now: float, most: int, *, alone: bool) -> QueuedRequest | None:
        """Return the next job; jobs that cannot finish in time are rejected before.

        most: rows that the batch has room for. alone: whether the batch is empty. The only job of
        the queue then has its turn in any case.
        """
        while job := self._queue.first():
            rows = min(job.rows_left, most)
            own_s = MARGIN * self._profile.seconds(rows, job.length_of_next(rows))
            if now + own_s <= job.terms.deadline or (alone and self._queue.rows == job.rows_left):
                return job
            late = "the request waited too long behind others to finish in time."
            self._refuse(job, Overloaded(late, own_s, "deadline"))
        return None

    def _taken(self, job: QueuedRequest, rows: int) -> BatchSlice:
        self._queue.took(job, rows, job.work_of_next(rows))
        return job.take(rows)

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
            answers = self._run(concatenate([piece.rows(self._lists) for piece in batch]))
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
        length: int | None,
        sealed: float,
        result: tuple[list[Arrays | Exception], float, float],
    ) -> None:
        outcomes, started, engine_s = result
        if not any(isinstance(outcome, Exception) for outcome in outcomes):
            # The duration of a failed batch is not typical.
            self._profile.observe(self._running_rows, engine_s, length)
        self._metrics.ran(started - sealed, engine_s, len(batch))
        self._running_rows, self._running_work, self._busy_until = 0, 0, 0.0
        if engine_s > SHORT_S:
            # Start the engine first, so that it runs while the responses are sent.
            self._wake()
        for piece, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                piece.job.refuse(outcome)
            else:
                piece.job.give(outcome)
        self._wake()
