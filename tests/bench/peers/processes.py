"""The processes that a server consists of, found by a variable of their environment.

By the tree of parents alone, what puts itself into the background would be lost.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

NAME = "HALYARD_BENCH"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
GONE_S = 30


def find(mark: str) -> Iterator[Path]:
    """Yield the folder in /proc of each process whose environment has NAME=mark."""
    wanted = f"{NAME}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield folder


def cpu_s(mark: str) -> float:
    """Return the processor time of the processes and of their children that have ended."""
    ticks = 0
    for folder in find(mark):
        with contextlib.suppress(OSError):
            # Behind the name in brackets: user, system, and of waited-for children user, system.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks * TICK_S


def kill(mark: str) -> None:
    """End what is left. Raises RuntimeError if it does not go."""
    deadline = time.monotonic() + GONE_S
    while left := list(find(mark)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {[folder.name for folder in left]} do not end")
        for folder in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.1)
