"""Writers of the request log, for a sample of the requests with their predictions and feedback.

Rows wait in bounded memory until a thread writes them to Parquet files below the storage path.
Rows that do not fit in memory or cannot be written are dropped and counted. Requests never wait.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import pyarrow as pa

from cluster.errors import UserError
from serve.config import LogOptions
from serve.requestlog import files, schema
from serve.requestlog.files import DAY_S, FEEDBACK, REQUESTS, LogWriter
from serve.requestlog.sampling import LOG, in_fraction
from serve.requestlog.schema import TIME, BufferedEntry, LogEntry
from serve.telemetry.metrics import Snapshot

logger = logging.getLogger(__name__)

# Memory of each log for rows that wait or are being written; rows beyond it are dropped.
MAX_MEMORY_BYTES = 32 * 2**20
# Limit for writing the last rows of a replica that ends.
CLOSE_S = 10.0

Item = TypeVar("Item")
Feedback = tuple[str, int, str | float, float]


class _Outcome(NamedTuple):
    """Result of one write: rows written, rows lost, size of the log, error of the storage."""

    rows: int
    lost_rows: int
    size_bytes: int
    problem: Exception | None


def check_log_fields(options: LogOptions, model: str, fields: Collection[str]) -> None:
    """Raise UserError if a field to exclude or hash is not one of the model's `fields`."""
    for option, names in (
        ("exclude_fields", options.exclude_fields),
        ("hash_fields", options.hash_fields),
    ):
        for name in names:
            if name not in fields:
                raise UserError(
                    f"option log.{option}={name}: the records of '{model}' have no such field; "
                    f"they have {', '.join(fields)}."
                )


class RequestSample:
    """A fraction of all requests, selected by their ids alone and so the same on every replica."""

    def __init__(self, share: float) -> None:
        self._share = share

    def has(self, request_id: str) -> bool:
        """Return whether a request is in the sample."""
        return bool(self._share) and in_fraction(request_id, self._share, LOG)


class BufferedLog(Generic[Item]):
    """Buffers items and writes them in a thread. Belongs to one event loop."""

    def __init__(
        self,
        root: str,
        model: str,
        kind: str,
        options: LogOptions,
        table: Callable[[Sequence[Item]], pa.Table],
        clock: Callable[[], float],
    ) -> None:
        """table: returns the rows of items, in the thread; items that it fails on are dropped."""
        self._root, self._model, self._kind = root, model, kind
        self._options, self._table, self._clock = options, table, clock
        self._writer = LogWriter(root, kind, model, options.file_rows)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._items: list[Item] = []
        self._rows = self._waiting_bytes = self._written_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[_Outcome] | None = None
        self._failing = False
        self.rows = self.size_bytes = 0
        self.dropped: Counter[str] = Counter(memory=0, disk=0, error=0)

    def add(self, item: Item, rows: int, size_bytes: int) -> None:
        """Buffer an item of `rows` rows and about `size_bytes` bytes; drop it if memory is full."""
        if self._waiting_bytes + self._written_bytes + size_bytes > MAX_MEMORY_BYTES:
            self.dropped["memory"] += rows
            return
        self._items.append(item)
        self._rows += rows
        self._waiting_bytes += size_bytes
        self._arm()

    def snapshot(self, labels: dict[str, str]) -> Snapshot:
        """Return the log's metrics. labels: those of every sample."""
        labels = {**labels, "log": self._kind}
        dropped = [
            ("_total", {**labels, "reason": why}, float(n)) for why, n in self.dropped.items()
        ]
        size = ("", labels, self.size_bytes)
        return {
            "log_rows": ("counter", "Rows written to the log.", [("_total", labels, self.rows)]),
            "log_dropped": ("counter", "Rows dropped instead of logged, by reason.", dropped),
            "log_bytes": ("gauge", "Size of all replicas' log files in bytes.", [size]),
        }

    async def close(self) -> None:
        """Write the buffered rows; drop those that are not written within CLOSE_S seconds."""
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._writing is not None or self._items:
                    self._write()
                    if self._writing is not None:
                        await asyncio.wait([self._writing])
                        # The callback, which starts the next write, runs in the loop's next turn.
                        await asyncio.sleep(0)
        except TimeoutError:
            self.dropped["disk"] += self._rows
            logger.error("the log of %s for %s was not written in time", self._kind, self._model)
        finally:
            self._disarm()
            self._items, self._rows = [], 0
            self._thread.shutdown(wait=False)

    def _arm(self) -> None:
        if self._writing is not None:
            return
        if self._rows >= self._options.file_rows:
            self._write()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._options.flush_s, self._write)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self) -> None:
        """Write the buffered items in the thread, unless it is still writing earlier ones."""
        self._disarm()
        if self._writing is not None or not self._items:
            return
        items, self._items = self._items, []
        rows, self._rows = self._rows, 0
        self._written_bytes, self._waiting_bytes = self._waiting_bytes, 0
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(self._thread, self._written, items)
        self._writing.add_done_callback(lambda done: self._finish(rows, done))

    def _finish(self, rows: int, done: "asyncio.Future[_Outcome]") -> None:
        self._writing, self._written_bytes = None, 0
        if done.cancelled():
            return
        outcome = done.result()
        self.rows += outcome.rows
        self.size_bytes = outcome.size_bytes
        self.dropped["error"] += rows - outcome.rows - outcome.lost_rows
        self.dropped["disk"] += outcome.lost_rows
        self._tell(outcome.problem)
        if self._items:
            self._arm()

    def _tell(self, problem: Exception | None) -> None:
        """Log the first of several failures, and the first success after them."""
        words = f"the log of {self._kind} for {self._model}"
        if problem is not None and not self._failing:
            logger.error("%s cannot be written: %s", words, problem)
        elif problem is None and self._failing:
            lost = self.dropped["disk"]
            logger.warning("%s can be written again; %d rows were lost so far", words, lost)
        self._failing = problem is not None

    def _written(self, items: Sequence[Item]) -> "_Outcome":
        """Write items and apply retention; called in the thread."""
        tables, now = self._tables(items), self._clock()
        rows, size_bytes = sum(each.num_rows for each in tables), self.size_bytes
        problem: Exception | None = None
        lost_rows = 0
        # fsspec file systems raise errors of many classes.
        try:
            if tables:
                self._writer.append(schema.concat_tables(tables), now)
        except Exception as error:
            problem, rows, lost_rows = error, 0, rows
        try:
            keep_s = self._options.retention_days * DAY_S
            left = files.apply_retention(
                self._root, self._model, self._options.max_bytes, keep_s, now
            )
            size_bytes = left[self._kind]
        except Exception as error:
            problem = problem or error
        return _Outcome(rows, lost_rows, size_bytes, problem)

    def _tables(self, items: Sequence[Item]) -> list[pa.Table]:
        """Convert all items at once; if that fails, one by one, to lose only those that fail."""
        try:
            return [self._table(items)]
        except Exception as error:
            if len(items) == 1:
                logger.warning("a request could not be logged: %s", error)
                return []
            return [table for item in items for table in self._tables([item])]


class RequestLog:
    """Log of one model's requests. Belongs to one event loop."""

    def __init__(
        self,
        root: str,
        model: str,
        options: LogOptions,
        *,
        clock: Callable[[], float] = files.wall_clock,
    ) -> None:
        """root: the storage path."""
        self._sample = RequestSample(options.sample_rate)
        self._drop, hashed = frozenset(options.exclude_fields), frozenset(options.hash_fields)
        self._log: BufferedLog[BufferedEntry] = BufferedLog(
            root, model, REQUESTS, options, lambda kept: schema.to_table(kept, hashed), clock
        )

    def wants(self, request_id: str) -> bool:
        """Return whether a request is in the sample and should be added."""
        return self._sample.has(request_id)

    def add(self, entry: LogEntry) -> None:
        """Add an answered request, with at most 64 of its rows. Never blocks, never raises."""
        try:
            kept = schema.buffer_entry(entry, self._drop)
            self._log.add(kept, len(kept.rows), kept.size_bytes)
        except Exception:
            self._log.dropped["error"] += 1
            logger.exception("a request could not be logged")

    def snapshot(self, labels: dict[str, str]) -> Snapshot:
        """Return the log's metrics. labels: those of every sample."""
        return self._log.snapshot(labels)

    async def close(self) -> None:
        """Write the buffered rows. Nothing may be added afterwards."""
        await self._log.close()


class FeedbackLog:
    """Log of the feedback on one model's requests. Belongs to one event loop."""

    def __init__(
        self,
        root: str,
        model: str,
        options: LogOptions,
        *,
        clock: Callable[[], float] = files.wall_clock,
    ) -> None:
        self._clock = clock
        self._log: BufferedLog[Feedback] = BufferedLog(
            root, model, FEEDBACK, options, _feedback, clock
        )

    def add(self, request_id: str, row: int, truth: str | float) -> None:
        """Add the label of one row of a request; readers use the latest label of a row."""
        self._log.add((request_id, row, truth, self._clock()), 1, 200 + len(request_id))

    def snapshot(self, labels: dict[str, str]) -> Snapshot:
        """Return the log's metrics. labels: those of every sample."""
        return self._log.snapshot(labels)

    async def close(self) -> None:
        """Write the buffered rows. Nothing may be added afterwards."""
        await self._log.close()


def _feedback(lines: Sequence[Feedback]) -> pa.Table:
    ids, rows, truths, times = zip(*lines, strict=True)
    texts = any(isinstance(truth, str) for truth in truths)
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "row": pa.array(rows, pa.int32()),
            "truth": pa.array(truths, pa.string() if texts else pa.float64()),
            "time": pa.array([int(time_s * 1e6) for time_s in times], TIME),
        }
    )


__all__ = ["FeedbackLog", "LogEntry", "RequestLog"]
