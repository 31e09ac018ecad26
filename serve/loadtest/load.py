"""When requests are sent: as answers come in, or at times of their own."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.loadtest.alarm import create_timer
from serve.loadtest.report import Outcome

# A closed loop's connections are opened over this part of the warm-up: of those that come at once,
# one process of a server whose processes share a socket would take all.
RAMP = 0.5
# In a closed loop, after a connection that failed: a server that is down is not asked in a spin.
PAUSE_S = 0.1


@dataclass(frozen=True)
class ClosedLoad:
    """Each connection sends its next request when it has its answer."""

    connections: int = 32

    def __str__(self) -> str:
        return f"closed loop, {self.connections} connections"


@dataclass(frozen=True)
class PoissonLoad:
    """Requests come at random times, however the server fares.

    connections: most that are open at once; a request that finds none free waits, and its wait
    counts.
    """

    rate_per_s: float
    connections: int = 512

    def __str__(self) -> str:
        return f"Poisson, {self.rate_per_s:,.1f} requests/s, at most {self.connections} connections"


Load = ClosedLoad | PoissonLoad


class Pacer(Protocol):
    """Calls `send` with the time at which a request is due, and `end` after the last answer."""

    lags_s: list[float]

    def start(self) -> None: ...

    def finished(self, outcome: Outcome) -> None:
        """One of the requests sent has its outcome."""

    def close(self) -> None: ...


def create_pacer(
    load: Load,
    start_s: float,
    warmup_s: float,
    duration_s: float,
    seed: int,
    send: Callable[[float], None],
    end: Callable[[], None],
) -> Pacer:
    """Return what carries out a load from start_s, a time of time.monotonic()."""
    seconds = warmup_s + duration_s
    if isinstance(load, ClosedLoad):
        return ClosedPacer(load.connections, RAMP * warmup_s, start_s + seconds, send, end)
    times_N = start_s + poisson_arrivals(load.rate_per_s, seconds, seed)
    return OpenPacer(times_N.tolist(), send, end)


@dataclass
class ClosedPacer:
    num_users: int
    ramp_s: float
    end_s: float
    send: Callable[[float], None]
    end: Callable[[], None]
    lags_s: list[float] = field(default_factory=list)

    def start(self) -> None:
        loop, num_users = asyncio.get_running_loop(), self.num_users
        for number in range(num_users):
            loop.call_later(number * self.ramp_s / num_users, self._next)

    def finished(self, outcome: Outcome) -> None:
        if outcome is Outcome.CONNECTION_ERROR:
            asyncio.get_running_loop().call_later(PAUSE_S, self._next)
        else:
            self._next()

    def _next(self) -> None:
        now = time.monotonic()
        if now < self.end_s:
            self.send(now)
            return
        self.num_users -= 1
        if self.num_users == 0:
            self.end()

    def close(self) -> None: ...


class OpenPacer:
    """lags_s: how much later than due each request was handed out; the client's own fault."""

    def __init__(
        self, times_s: list[float], send: Callable[[float], None], end: Callable[[], None]
    ) -> None:
        self._times_s, self._send, self._end = times_s, send, end
        self._next, self._unfinished = 0, len(times_s)
        self._alarm = create_timer(asyncio.get_running_loop(), self._send_due)
        self.lags_s: list[float] = []

    def start(self) -> None:
        if self._times_s:
            self._alarm.at(self._times_s[0])
        else:
            self._end()

    def finished(self, outcome: Outcome) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._end()

    def close(self) -> None:
        self._alarm.close()

    def _send_due(self) -> None:
        now, times_s = time.monotonic(), self._times_s
        while self._next < len(times_s) and times_s[self._next] <= now:
            due_s = times_s[self._next]
            self._next += 1
            self.lags_s.append(now - due_s)
            self._send(due_s)
        if self._next < len(times_s):
            self._alarm.at(times_s[self._next])


def poisson_arrivals(rate_per_s: float, seconds: float, seed: int) -> np.ndarray:
    """Return the times in [0, seconds) of a Poisson process, in order."""
    mean = rate_per_s * seconds
    # Six standard deviations more than the mean: enough but once in a billion draws.
    count = int(mean + 6 * mean**0.5 + 20)
    times_N = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count))
    return times_N[times_N < seconds]
