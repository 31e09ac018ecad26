"""A request in the queue, and the part of it that a batch takes."""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.inference.latency_model import LatencyModel
from serve.inference.request_options import RequestOptions
from train.tasks import Arrays
from train.values import ragged
from train.values.records import concatenate, num_rows

# A row may be overtaken by shorter ones for this many times its own work.
STRETCH = 3


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request in the queue. Several batches may each take some of its rows.

    lengths: of its rows, in increasing order; empty if all rows have the same shape. order: the
    place that each row had in the request, int64 [N], if another one. works: work of each row.
    """

    rows: Arrays
    count: int
    terms: RequestOptions
    answer: asyncio.Future[Arrays]
    entered: float
    lengths: Sequence[int] = ()
    order: np.ndarray | None = None
    works: Sequence[int] = ()
    taken: int = 0
    work_left: int = 0
    delay: int = 0
    parts: list[Arrays] = field(default_factory=list)

    @classmethod
    def of(
        cls, rows: Arrays, terms: RequestOptions, lists: Collection[str], profile: LatencyModel
    ) -> "QueuedRequest":
        """Return a request for the queue of the running event loop; rows are sorted by length.

        rows: input → array of shape [N, …]. lists: names of the inputs whose rows differ in length.
        """
        answer = asyncio.get_running_loop().create_future()
        job = cls(rows, num_rows(rows), terms, answer, time.perf_counter())
        job.work_left = job.count * profile.work()
        if not lists:
            return job
        lengths_N = np.sum([ragged.row_lengths(rows[name]) for name in lists], axis=0)
        if np.any(np.diff(lengths_N) < 0):
            job.order = np.argsort(lengths_N, kind="stable")
            lengths_N = lengths_N[job.order]
            job.rows = {name: array[job.order] for name, array in rows.items()}
        job.lengths = np.maximum(lengths_N, 1).tolist()
        job.works = [profile.work(length) for length in job.lengths]
        job.work_left = sum(job.works)
        job.delay = STRETCH * job.works[-1]
        return job

    @property
    def rows_left(self) -> int:
        return self.count - self.taken

    @property
    def gone(self) -> bool:
        return self.answer.done()

    def work_of_next(self, rows: int) -> int:
        """Return the work of the next `rows` rows."""
        return sum(self.works[self.taken : self.taken + rows]) if self.works else rows

    def length_of_next(self, rows: int) -> int | None:
        """Return the length of the longest of the next `rows` rows; None if all are the same."""
        return self.lengths[self.taken + rows - 1] if self.lengths else None

    def take(self, rows: int) -> "BatchSlice":
        """Take the next rows for a batch."""
        piece = BatchSlice(self, self.taken, self.taken + rows)
        self.work_left -= self.work_of_next(rows)
        self.taken += rows
        return piece

    def refuse(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def drop(self) -> None:
        if self.rows_left:
            self.rows, self.parts = {}, []
        self.count, self.work_left = self.taken, 0

    def give(self, part: Arrays) -> None:
        """Add outputs of the next rows, of shape [rows, …]; the last ones complete the request."""
        self.parts.append(part)
        if not self.answer.done() and sum(map(num_rows, self.parts)) == self.count:
            found = concatenate(self.parts)
            if self.order is not None:
                found = {name: ragged.in_place(array, self.order) for name, array in found.items()}
            self.answer.set_result(found)


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """Some rows of one request, in a batch."""

    job: QueuedRequest
    start: int
    stop: int

    @property
    def length(self) -> int | None:
        """Length of the longest row; None if all have the same shape."""
        return self.job.lengths[self.stop - 1] if self.job.lengths else None

    @property
    def values(self) -> int:
        """Sum of the rows' lengths."""
        return sum(self.job.lengths[self.start : self.stop])

    def rows(self, lists: Collection[str]) -> Arrays:
        """Return the inputs of these rows, each of shape [stop - start, …].

        lists: names of the inputs that are padded, of which only what is used is returned.
        """
        job = self.job
        if self.stop - self.start == job.count:
            return job.rows
        chosen = {name: array[self.start : self.stop] for name, array in job.rows.items()}
        return {
            name: ragged.trim(array) if name in lists else array for name, array in chosen.items()
        }
