"""When requests are sent: after the previous response, or at random times.

Shapes: N arrivals.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.loadtest.alarm import create_timer
from serve.loadtest.report import Outcome

# Fraction of the warm-up over which a closed loop opens its connections. If all were opened at
# once, a server whose processes share a socket could accept all of them in one process.
RAMP = 0.5
# Pause of a closed loop after a failed connection, so that it does not spin while a server is down.
PAUSE_S = 0.1


@dataclass(frozen=True)
class ClosedLoad:
    """A closed loop: each connection sends its next request after the response to the last."""

    connections: int = 32

    def __str__(self) -> str:
        return f"closed loop, {self.connections} connections"


@dataclass(frozen=True)
class PoissonLoad:
    """Requests at the random times of a Poisson process, independent of the responses.

    connections: maximum open at once. A request that finds none free waits, and this wait is part
    of its latency.
    """

    rate_per_s: float
    connections: int = 512

    def __str__(self) -> str:
        return f"Poisson, {self.rate_per_s:,.1f} requests/s, at most {self.connections} connections"


Load = ClosedLoad | PoissonLoad


class Pacer(Protocol):
    """Calls `send` with the time at which a request is due, and `end` after the last outcome.

    lags_s: see `OpenPacer`; empty for a closed loop.
    """

    lags_s: list[float]

    def start(self) -> None: ...

    def finished(self, outcome: Outcome) -> None:
        """Register the outcome of one of the requests that were sent."""

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
    """Return the pacer of a load that starts at start_s, a time of time.monotonic()."""
    seconds = warmup_s + duration_s
    if isinstance(load, ClosedLoad):
        return ClosedPacer(load.connections, RAMP * warmup_s, start_s + seconds, send, end)
    times_N = start_s + poisson_arrivals(load.rate_per_s, seconds, seed)
    return OpenPacer(times_N.tolist(), send, end)


@dataclass
class ClosedPacer:
    """Pacer of a closed loop of `num_users` connections, started over `ramp_s` seconds."""

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
    """Pacer that sends each request when it is due.

    lags_s: for each request, how many seconds after it was due the client sent it. Large values
    mean that the client itself is overloaded.
    """

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
    """Return the arrival times of a Poisson process in [0, seconds), float64 [N], ascending."""
    mean = rate_per_s * seconds
    # Six standard deviations above the mean: too few in one of a billion draws.
    count = int(mean + 6 * mean**0.5 + 20)
    times_N = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count))
    return times_N[times_N < seconds]
