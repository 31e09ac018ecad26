"""Admission control: the options of each request, and the queue in which requests wait.

A request that cannot finish by its deadline is rejected at once: an early error is more useful to
the client than a late one, and the engine computes no predictions that nobody reads. If the
estimate was wrong, the batcher rejects the request when it takes it from the queue.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sortedcontainers import SortedDict, SortedList

from serve.errors import BadRequest, Overloaded, abbreviated
from serve.inference.latency_model import LatencyModel

# Safety factors for the estimated time of a batch and of the wait in the queue. The second is
# larger because errors add up: without it, requests that just fit would be late half the time.
MARGIN, LINE_MARGIN = 1.1, 1.4
# Longest stored name of a client, in characters, and number of stored clients above which those
# with nothing waiting are removed.
MAX_CLIENT, MAX_CLIENTS = 64, 1024


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of a request, after the server's limits are applied.

    deadline: seconds on the event loop's clock. priority: 1 is the most urgent. client: the client
    whose share of the engine the request uses.
    """

    deadline: float
    priority: int = 1
    client: str = ""


def request_options(
    parameters: Mapping[str, Any],
    *,
    now: float,
    timeout_s: float,
    priorities: int,
    client: str,
    asked_s: float | None = None,
) -> RequestOptions:
    """Read the protocol's `timeout` (microseconds) and `priority` (0 or none: the middle level).

    now: seconds on the event loop's clock. timeout_s: the server's limit. asked_s: seconds until
    the client's own deadline; None if there is none. Raises BadRequest if a parameter is invalid.
    """
    limit_s = timeout_s if asked_s is None else min(timeout_s, max(asked_s, 0))
    microseconds = parameters.get("timeout")
    if microseconds is not None:
        if type(microseconds) is not int or microseconds < 0:
            raise BadRequest(
                f"parameter 'timeout' is {abbreviated(microseconds)}; expected microseconds as an "
                "integer of at least 0."
            )
        if microseconds:
            limit_s = min(limit_s, microseconds / 1_000_000)
    priority = parameters.get("priority") or (priorities + 1) // 2
    if type(priority) is not int or not 1 <= priority <= priorities:
        raise BadRequest(
            f"parameter 'priority' is {abbreviated(priority)}; expected an integer from 0 to "
            f"{priorities}."
        )
    return RequestOptions(now + limit_s, priority, client[:MAX_CLIENT])


class QueueItem(Protocol):
    """A request that can wait in the queue."""

    terms: RequestOptions

    @property
    def rows_left(self) -> int: ...  # rows that no batch has taken

    @property
    def gone(self) -> bool:
        """Whether no client waits for its result any more."""
        ...

    def refuse(self, error: Exception) -> None: ...

    def drop(self) -> int:
        """Release the rows that no batch has taken; return their number."""
        ...


Job = TypeVar("Job", bound=QueueItem)

# A job's priority level, tag and number in order of arrival. The queue is sorted by them.
Place = tuple[int, float, int]


class FairQueue(Generic[Job]):
    """A queue ordered by priority, then by fair shares of rows between clients, then by arrival.

    Start-time fair queueing (Goyal et al. 1996): a job's tag is the row at which the job would
    start if its client had an equal share; the smallest tag goes first. The time per job is
    logarithmic in the number of waiting jobs, whatever names clients use.
    """

    def __init__(self) -> None:
        # Place in the queue → job.
        self._line: SortedDict[Place, Job] = SortedDict()
        self._place_of: dict[int, Place] = {}
        # Client → its places, sorted.
        self._places_of_client: dict[str, list[Place]] = {}
        self._order = itertools.count()
        self._clock: dict[int, float] = defaultdict(float)
        self._next: dict[tuple[int, str], float] = {}
        self._most_remembered = MAX_CLIENTS
        self._rows_of_client: dict[str, int] = {}
        # (rows, client), sorted, so that the client with the most rows is last.
        self._shares: SortedList[tuple[int, str]] = SortedList()
        self._rows_of_level: dict[int, int] = defaultdict(int)
        self.rows = 0

    def __len__(self) -> int:
        return len(self._line)

    def push(self, job: Job) -> None:
        """Add a job to the queue."""
        level, client, count = job.terms.priority, job.terms.client, job.rows_left
        tag = max(self._clock[level], self._next.get((level, client), 0.0))
        if len(self._next) >= self._most_remembered:
            # Remove clients whose next tag is behind the clock: they start at the clock anyway.
            clock = self._clock
            self._next = {who: tag for who, tag in self._next.items() if tag > clock[who[0]]}
            self._most_remembered = max(MAX_CLIENTS, 2 * len(self._next))
        self._next[level, client] = tag + count
        self._enter(job, (level, tag, next(self._order)))
        self._count(job, count)

    def first(self) -> Job | None:
        """Return the next job, or None if the queue is empty; jobs that are gone are removed."""
        while self._line:
            _, job = self._line.peekitem(0)
            if not job.gone:
                return job
            self._exit(job)
        self._clock.clear()
        self._next.clear()
        return None

    def took(self, rows: int) -> None:
        """Take `rows` of the first job's rows; with the last of them the job leaves the queue."""
        (level, tag, order), job = self._line.peekitem(0)
        self._clock[level] = tag
        self._count(job, -rows)
        self._exit(job)
        if job.rows_left > rows:
            # The job's remaining rows get a later tag, so that other clients have their turn.
            self._enter(job, (level, tag + rows, order))

    def leave(self, job: Job) -> None:
        """Remove a job before its turn. Calling this again for the same job has no effect."""
        rows = job.drop()
        if not rows:
            return
        self._count(job, -rows)
        who = job.terms.priority, job.terms.client
        if who in self._next:
            self._next[who] -= rows
        self._exit(job)

    def ahead(self, terms: RequestOptions, count: int) -> int:
        """Return about how many rows are computed before those of a new job of `count` rows."""
        if not self.rows:
            return 0
        rows = sum(n for level, n in self._rows_of_level.items() if level <= terms.priority)
        own = self._rows_of_client.get(terms.client, 0)
        others = len(self._rows_of_client) - (own > 0)
        return min(rows, (own + count) * (others + 1))

    def evictable(self, terms: RequestOptions, count: int) -> list[Job]:
        """Return jobs to evict for a new job of `count` rows; empty if they are not enough.

        They are less urgent jobs, or else the latest jobs of the client with the most waiting rows
        if that client, after the eviction, still has no fewer rows than the new job's client.
        """
        less_urgent = itertools.takewhile(lambda at: at[0] > terms.priority, reversed(self._line))
        if chosen := self._latest(less_urgent, count):
            return chosen
        most, greediest = self._shares[-1] if self._shares else (0, terms.client)
        if (
            greediest == terms.client
            or most - self._rows_of_client.get(terms.client, 0) < 2 * count
        ):
            return []
        theirs = reversed(self._places_of_client.get(greediest, ()))
        return self._latest((at for at in theirs if at[0] >= terms.priority), count)

    def _latest(self, places: Iterable[Place], count: int) -> list[Job]:
        """Return the jobs at the first of some places that have `count` rows in total; empty if all
        of them have fewer."""
        chosen: list[Job] = []
        rows = 0
        for place in places:
            if rows >= count:
                break
            job = self._line[place]
            if not job.gone:
                chosen.append(job)
                rows += job.rows_left
        return chosen if rows >= count else []

    def _enter(self, job: Job, place: Place) -> None:
        self._line[place] = job
        self._place_of[id(job)] = place
        bisect.insort(self._places_of_client.setdefault(job.terms.client, []), place)

    def _exit(self, job: Job) -> None:
        """Remove a job from the queue, if it is still there."""
        place = self._place_of.pop(id(job), None)
        if place is None:
            return
        del self._line[place]
        places = self._places_of_client[job.terms.client]
        places.pop(bisect.bisect_left(places, place))
        if not places:
            del self._places_of_client[job.terms.client]

    def _count(self, job: Job, change: int) -> None:
        self.rows += change
        self._rows_of_level[job.terms.priority] += change
        client = job.terms.client
        before = self._rows_of_client.get(client, 0)
        rows = before + change
        if before:
            self._shares.remove((before, client))
        if rows:
            self._rows_of_client[client] = rows
            self._shares.add((rows, client))
        else:
            del self._rows_of_client[client]


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
    ) -> list[Any]:
        """Return the jobs that must be evicted for a request of `count` rows; usually none.

        now, busy_until: seconds on the event loop's clock; the engine is expected to be busy until
        then. batch: rows of a full batch. encoding_rows: rows that are not in the queue yet. Raises
        Overloaded if the request cannot finish by its deadline, or if the queue is full.
        """
        waiting = self._queue.rows + encoding_rows
        per_row_s = self._profile.seconds(batch) / batch
        busy_s = max(busy_until - now, 0)
        wait_s = busy_s + per_row_s * (self._queue.ahead(terms, count) + encoding_rows)
        own_s = self._profile.seconds(min(count, batch)) + per_row_s * max(count - batch, 0)
        left_s = terms.deadline - now
        if not busy_s and not waiting:
            # Try an idle engine even if it was slow before: only a batch can show that it is not.
            own_s = min(own_s, self._profile.measured(count))
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
        jobs = self._queue.evictable(terms, count)
        if not jobs:
            raise self.full(busy_s)
        return jobs

    def full(self, busy_s: float = 0) -> Overloaded:
        """Return the error for a full queue. busy_s: seconds until the engine is free."""
        rows, drained_s = self._queue.rows, busy_s + self._queue.rows * self._profile.seconds(1)
        return Overloaded(f"the queue is full: {rows} rows are waiting.", drained_s, "queue_full")
