"""Exact timers, because event loops round theirs to whole milliseconds."""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import Protocol

# From <sys/timerfd.h> and <time.h> of Linux.
CLOCK_MONOTONIC, TFD_NONBLOCK, TFD_TIMER_ABSTIME = 1, 0o4000, 1


class Timer(Protocol):
    """A timer that calls a function at a set time."""

    def at(self, when_s: float) -> None:
        """Set the time of the next call, by time.monotonic(); replaces an earlier setting."""

    def close(self) -> None: ...


def create_timer(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> Timer:
    """Return the most exact timer that this system has."""
    if hasattr(ctypes.CDLL(None), "timerfd_create"):
        return KernelTimer(loop, call)
    return LoopTimer(loop, call)


class _Times(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = [
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    ]


class KernelTimer:
    """A timer by Linux's timerfd, exact to about 50 microseconds. Raises OSError if it fails."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop, self._call = loop, call
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        loop.add_reader(self._file, self._ring)

    def at(self, when_s: float) -> None:
        # A time in the past fires at once; zero would disarm the timer.
        seconds, nanoseconds = divmod(max(1, round(when_s * 1e9)), 1_000_000_000)
        times = _Times(0, 0, seconds, nanoseconds)
        self._libc.timerfd_settime(self._file, TFD_TIMER_ABSTIME, ctypes.byref(times), None)

    def close(self) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _ring(self) -> None:
        os.read(self._file, 8)
        self._call()


class LoopTimer:
    """A timer by the event loop, exact to a millisecond."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop, self._call = loop, call
        self._timer: asyncio.TimerHandle | None = None

    def at(self, when_s: float) -> None:
        self.close()
        self._timer = self._loop.call_later(max(0.0, when_s - time.monotonic()), self._call)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
