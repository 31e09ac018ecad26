"""The queue in which requests wait for the engine."""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from sortedcontainers import SortedDict, SortedList

from serve.inference.request_options import RequestOptions

# Number of stored clients above which those with nothing waiting are removed.
MAX_CLIENTS = 1024


class QueueItem(Protocol):
    """A request that can wait in the queue."""

    terms: RequestOptions

    @property
    def rows_left(self) -> int: ...  # rows that no batch has taken

    @property
    def work_left(self) -> int: ...  # work of these rows, see `LatencyModel.work`

    @property
    def delay(self) -> int: ...  # work of others that may go first; more for longer rows

    @property
    def gone(self) -> bool:
        """Whether no client waits for its result any more."""
        ...

    def refuse(self, error: Exception) -> None: ...

    def drop(self) -> None:
        """Release the rows that no batch has taken."""
        ...


Job = TypeVar("Job", bound=QueueItem)

# A job's priority level, tag and number in order of arrival. The queue is sorted by them.
Place = tuple[int, float, int]


class FairQueue(Generic[Job]):
    """A queue ordered by priority, then by fair shares of work between clients, then by arrival.

    Start-time fair queueing (Goyal et al. 1996): a job's start is the work after which it would
    start if its client had an equal share. The job with the smallest tag goes first, which is the
    start plus the job's `delay`: so short rows overtake long ones, but each only so many. The time
    per job is logarithmic in the number of waiting jobs, whatever names clients use.
    """

    def __init__(self) -> None:
        # Place in the queue → job.
        self._line: SortedDict[Place, Job] = SortedDict()
        self._place_of: dict[int, Place] = {}
        self._start_of: dict[int, float] = {}
        # Client → its places, sorted.
        self._places_of_client: dict[str, list[Place]] = {}
        self._order = itertools.count()
        self._clock: dict[int, float] = defaultdict(float)
        self._next: dict[tuple[int, str], float] = {}
        self._most_remembered = MAX_CLIENTS
        self._work_of_client: dict[str, int] = {}
        # (work, client), sorted, so that the client with the most work is last.
        self._shares: SortedList[tuple[int, str]] = SortedList()
        self._work_of_level: dict[int, int] = defaultdict(int)
        self.rows = self.work = 0

    def __len__(self) -> int:
        return len(self._line)

    def push(self, job: Job) -> None:
        """Add a job to the queue."""
        level, client, work = job.terms.priority, job.terms.client, job.work_left
        start = max(self._clock[level], self._next.get((level, client), 0.0))
        if len(self._next) >= self._most_remembered:
            # Remove clients whose next tag is behind the clock: they start at the clock anyway.
            clock = self._clock
            self._next = {who: tag for who, tag in self._next.items() if tag > clock[who[0]]}
            self._most_remembered = max(MAX_CLIENTS, 2 * len(self._next))
        self._next[level, client] = start + work
        self._enter(job, start, next(self._order))
        self._count(job, job.rows_left, work)

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

    def waiting(self, most_rows: int) -> list[Job]:
        """Return the next jobs of the most urgent level, in order, with about `most_rows` rows."""
        found: list[Job] = []
        rows = 0
        for (level, _, _), job in self._line.items():
            if rows >= most_rows or (found and level != found[0].terms.priority):
                break
            if not job.gone:
                found.append(job)
                rows += job.rows_left
        return found

    def took(self, job: Job, rows: int, work: int) -> None:
        """Take `rows` of a job's rows; with the last of them the job leaves the queue.

        work: of these rows.
        """
        level, _, order = self._place_of[id(job)]
        start = self._start_of[id(job)]
        self._clock[level] = max(self._clock[level], start)
        self._count(job, -rows, -work)
        self._exit(job)
        if job.rows_left > rows:
            # The job's remaining rows start later, so that other clients have their turn.
            self._enter(job, start + work, order)

    def leave(self, job: Job) -> None:
        """Remove a job before its turn. Calling this again for the same job has no effect."""
        rows, work = job.rows_left, job.work_left
        job.drop()
        if not rows:
            return
        self._count(job, -rows, -work)
        who = job.terms.priority, job.terms.client
        if who in self._next:
            self._next[who] -= work
        self._exit(job)

    def ahead(self, terms: RequestOptions, work: int) -> int:
        """Return about how much work is done before that of a new job with `work`."""
        if not self.rows:
            return 0
        known = sum(n for level, n in self._work_of_level.items() if level <= terms.priority)
        own = self._work_of_client.get(terms.client, 0)
        others = len(self._work_of_client) - (own > 0)
        return min(known, (own + work) * (others + 1))

    def evictable(self, terms: RequestOptions, count: int, work: int) -> list[Job]:
        """Return jobs to evict for a new job of `count` rows; empty if they are not enough.

        They are less urgent jobs, or else the latest jobs of the client with the most waiting work
        if that client, after the eviction, still has no less work than the new job's client.
        """
        less_urgent = itertools.takewhile(lambda at: at[0] > terms.priority, reversed(self._line))
        if chosen := self._latest(less_urgent, count):
            return chosen
        most, greediest = self._shares[-1] if self._shares else (0, terms.client)
        if greediest == terms.client or most - self._work_of_client.get(terms.client, 0) < 2 * work:
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

    def _enter(self, job: Job, start: float, order: int) -> None:
        place = job.terms.priority, start + job.delay, order
        self._line[place] = job
        self._start_of[id(job)] = start
        self._place_of[id(job)] = place
        bisect.insort(self._places_of_client.setdefault(job.terms.client, []), place)

    def _exit(self, job: Job) -> None:
        """Remove a job from the queue, if it is still there."""
        place = self._place_of.pop(id(job), None)
        if place is None:
            return
        del self._line[place], self._start_of[id(job)]
        places = self._places_of_client[job.terms.client]
        places.pop(bisect.bisect_left(places, place))
        if not places:
            del self._places_of_client[job.terms.client]

    def _count(self, job: Job, rows: int, change: int) -> None:
        self.rows += rows
        self.work += change
        self._work_of_level[job.terms.priority] += change
        client = job.terms.client
        before = self._work_of_client.get(client, 0)
        work = before + change
        if before:
            self._shares.remove((before, client))
        if work:
            self._work_of_client[client] = work
            self._shares.add((work, client))
        else:
            del self._work_of_client[client]
