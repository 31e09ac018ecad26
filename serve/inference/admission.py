"""Admission: what each request is granted, and the line it waits in.

A request whose answer cannot be ready by its deadline is refused at once: an error now is worth
more to its client than one later, and the engine computes only what somebody will read. Where the
estimate was wrong, the batcher refuses it when it is taken from the line.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sortedcontainers import SortedDict, SortedList

from serve.errors import BadRequest, Overloaded
from serve.inference.latency_model import LatencyModel

# Estimates err; this much more time than expected must be left for a batch, and, as errors add up,
# for a wait in the line. A line as long as the deadline would be answered too late half the time.
MARGIN, LINE_MARGIN = 1.1, 1.4
# What a client calls itself is kept no longer than this; nor are more clients that have nothing
# waiting remembered.
MAX_CLIENT, MAX_CLIENTS = 64, 1024


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request is granted.

    deadline: time of the event loop's clock, seconds. priority: 1 goes first. client: whose share
    of the engine it takes.
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

    timeout_s: the server's limit. asked_s: what is left of the client's own time, if it says.
    Raises BadRequest.
    """
    limit_s = timeout_s if asked_s is None else min(timeout_s, max(asked_s, 0))
    microseconds = parameters.get("timeout")
    if microseconds is not None:
        if type(microseconds) is not int or microseconds < 0:
            raise BadRequest(
                f"parameter 'timeout' is {str(microseconds)[:40]}; expected a whole number of "
                "microseconds."
            )
        if microseconds:
            limit_s = min(limit_s, microseconds / 1_000_000)
    priority = parameters.get("priority") or (priorities + 1) // 2
    if type(priority) is not int or not 1 <= priority <= priorities:
        raise BadRequest(
            f"parameter 'priority' is {str(priority)[:40]}; expected a whole number from 0 to "
            f"{priorities}."
        )
    return RequestOptions(now + limit_s, priority, client[:MAX_CLIENT])


class QueueItem(Protocol):
    """What can stand in the line."""

    terms: RequestOptions

    @property
    def rows_left(self) -> int: ...

    @property
    def gone(self) -> bool:
        """Whether nobody waits for its answer any more."""
        ...

    def refuse(self, error: Exception) -> None: ...

    def drop(self) -> int:
        """Let go of the rows that no batch has taken, and return how many they were."""
        ...


Job = TypeVar("Job", bound=QueueItem)

# A job's level, tag and number in order of arrival, by which the line is sorted.
Place = tuple[int, float, int]


class FairQueue(Generic[Job]):
    """By priority, then fair between clients by rows, then in order of arrival.

    Start-time fair queueing (Goyal et al. 1996): each job is tagged with the row at which it would
    start if its client had its equal share; the smallest tag goes first. What a job costs here
    grows with the logarithm of how many wait, whatever their clients are called.
    """

    def __init__(self) -> None:
        # Places in the line (level, tag, order), each with its job.
        self._line: SortedDict[Place, Job] = SortedDict()
        self._place_of: dict[int, Place] = {}
        # Those of each client, sorted as well.
        self._places_of_client: dict[str, list[Place]] = {}
        self._order = itertools.count()
        self._clock: dict[int, float] = defaultdict(float)
        self._next: dict[tuple[int, str], float] = {}
        self._most_remembered = MAX_CLIENTS
        self._rows_of_client: dict[str, int] = {}
        # (rows, client), so that the client with the most is the last.
        self._shares: SortedList[tuple[int, str]] = SortedList()
        self._rows_of_level: dict[int, int] = defaultdict(int)
        self.rows = 0

    def __len__(self) -> int:
        return len(self._line)

    def push(self, job: Job) -> None:
        level, client, count = job.terms.priority, job.terms.client, job.rows_left
        tag = max(self._clock[level], self._next.get((level, client), 0.0))
        if len(self._next) >= self._most_remembered:
            # Who is behind the clock starts at the clock anyway.
            clock = self._clock
            self._next = {who: tag for who, tag in self._next.items() if tag > clock[who[0]]}
            self._most_remembered = max(MAX_CLIENTS, 2 * len(self._next))
        self._next[level, client] = tag + count
        self._enter(job, (level, tag, next(self._order)))
        self._count(job, count)

    def first(self) -> Job | None:
        """The job whose turn it is; those that are gone leave."""
        while self._line:
            _, job = self._line.peekitem(0)
            if not job.gone:
                return job
            self._exit(job)
        self._clock.clear()
        self._next.clear()
        return None

    def took(self, rows: int) -> None:
        """Take `rows` of the first job's rows; with its last ones it leaves the line."""
        (level, tag, order), job = self._line.peekitem(0)
        self._clock[level] = tag
        self._count(job, -rows)
        self._exit(job)
        if job.rows_left > rows:
            # What is left of it takes its turn after others that are as far.
            self._enter(job, (level, tag + rows, order))

    def leave(self, job: Job) -> None:
        """A job has gone before its turn: its rows count no more. May be told more than once."""
        rows = job.drop()
        if not rows:
            return
        self._count(job, -rows)
        who = job.terms.priority, job.terms.client
        if who in self._next:
            self._next[who] -= rows
        self._exit(job)

    def ahead(self, terms: RequestOptions, count: int) -> int:
        """About how many rows are answered before those of a job that came now."""
        if not self.rows:
            return 0
        rows = sum(n for level, n in self._rows_of_level.items() if level <= terms.priority)
        own = self._rows_of_client.get(terms.client, 0)
        others = len(self._rows_of_client) - (own > 0)
        return min(rows, (own + count) * (others + 1))

    def evictable(self, terms: RequestOptions, count: int) -> list[Job]:
        """Jobs that go in favour of one of `count` rows: less urgent ones, or the greediest's.

        The greediest client is the one with the most waiting; its latest jobs go where it has,
        with them gone, still no less than the newcomer. Empty where there are not enough.
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
        """Jobs at the first of some places that have `count` rows together; none if there are not
        so many."""
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
        """Take a job out of the line, if it is still there."""
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
    """Says of each request whether it may wait, and if not, why not and when to come again."""

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
        """Return the jobs that must go for a request of `count` rows; mostly none.

        busy_until: when the engine is expected to be free. batch: rows it takes at once.
        encoding_rows: on their way into the line. Raises Overloaded for a request that cannot be
        answered in time, or finds the line full.
        """
        waiting = self._queue.rows + encoding_rows
        per_row_s = self._profile.seconds(batch) / batch
        busy_s = max(busy_until - now, 0)
        wait_s = busy_s + per_row_s * (self._queue.ahead(terms, count) + encoding_rows)
        own_s = self._profile.seconds(min(count, batch)) + per_row_s * max(count - batch, 0)
        left_s = terms.deadline - now
        if not busy_s and not waiting:
            # Nothing else shows that the engine has become fast again.
            own_s = min(own_s, self._profile.measured(count))
        if LINE_MARGIN * wait_s + MARGIN * own_s > left_s:
            raise Overloaded(
                f"the answer would take about {wait_s + own_s:.3g} s and only "
                f"{max(left_s, 0):.3g} s are left; {waiting} rows are waiting.",
                wait_s + own_s - left_s,
                "deadline",
            )
        if not waiting or waiting + count <= self._max_queue_rows:
            return []
        jobs = self._queue.evictable(terms, count)
        if not jobs:
            raise self.full(busy_s)
        return jobs

    def full(self, busy_s: float = 0) -> Overloaded:
        drained_s = busy_s + self._queue.rows * self._profile.seconds(1)
        return Overloaded(f"{self._queue.rows} rows are waiting already.", drained_s, "queue_full")
