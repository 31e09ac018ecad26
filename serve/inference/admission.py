"""Admission control: which requests may wait.

A request that cannot finish by its deadline is rejected at once: an early error is more useful to
the client than a late one, and the engine computes no predictions that nobody reads. If the
estimate was wrong, the batcher rejects the request when it takes it from the queue.
"""

from collections.abc import Sequence
from typing import Any

from serve.errors import Overloaded
from serve.inference.fair_queue import FairQueue
from serve.inference.latency_model import LatencyModel
from serve.inference.request_options import RequestOptions

# Safety factors for the estimated time of a batch and of the wait in the queue. The second is
# larger because errors add up: without it, requests that just fit would be late half the time.
MARGIN, LINE_MARGIN = 1.1, 1.4


class AdmissionController:
    """Decides whether a request may wait. Its errors say why not and when to retry."""

    def __init__(self, queue: FairQueue[Any], profile: LatencyModel, max_queue_rows: int) -> None:
        self._queue = queue
        self._profile = profile
        self._max_queue_rows = max_queue_rows

    def admit(
        self,
        terms: RequestOptions,
        count: int,
        *,
        now: float,
        busy_until: float,
        batch: int,
        encoding_rows: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> list[Any]:
        """Return the jobs that must be evicted for a request of `count` rows; usually none.

        now, busy_until: seconds on the event loop's clock; the engine is expected to be busy until
        then. batch: rows of a full batch. encoding_rows: rows that are not in the queue yet.
        lengths: of the request's rows, if they differ and are known. Raises Overloaded if the
        request cannot finish by its deadline, or if the queue is full.
        """
        profile = self._profile
        waiting = self._queue.rows + encoding_rows
        longest = max(lengths) if lengths else None
        work = sum(map(profile.work, lengths)) if lengths else count * profile.work()
        unit_s = profile.unit_s(batch)
        busy_s = max(busy_until - now, 0)
        ahead = self._queue.ahead(terms, work) + encoding_rows * profile.work()
        wait_s = busy_s + unit_s * ahead
        later = max(count - batch, 0) / count
        own_s = profile.seconds(min(count, batch), longest) + unit_s * work * later
        left_s = terms.deadline - now
        if not busy_s and not waiting:
            # Try an idle engine even if it was slow before: only a batch can show that it is not.
            own_s = min(own_s, profile.measured(count, longest))
        most_s = LINE_MARGIN * wait_s + MARGIN * own_s
        if most_s > left_s:
            raise Overloaded(
                f"the request may take {most_s:.3g} s, but only {max(left_s, 0):.3g} s are left; "
                f"{waiting} rows are waiting.",
                # The wait shrinks by a second per second, and the margin on it with it.
                (most_s - left_s) / LINE_MARGIN,
                "deadline",
            )
        if not waiting or waiting + count <= self._max_queue_rows:
            return []
        jobs = self._queue.evictable(terms, count, work)
        if not jobs:
            raise self.full(busy_s)
        return jobs

    def full(self, busy_s: float = 0) -> Overloaded:
        """Return the error for a full queue. busy_s: seconds until the engine is free."""
        rows, drained_s = self._queue.rows, busy_s + self._queue.rows * self._profile.seconds(1)
        return Overloaded(f"the queue is full: {rows} rows are waiting.", drained_s, "queue_full")
