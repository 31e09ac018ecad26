"""The processes of a server, found by an environment variable.

The process tree alone would miss daemons, which detach from their parent.
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
    """Return the CPU seconds of the processes and of their children that have ended."""
    ticks = 0
    for folder in find(mark):
        with contextlib.suppress(OSError):
            # Items 11 to 14 after the name in brackets: utime, stime, cutime, cstime (man 5 proc).
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks * TICK_S


def kill(mark: str) -> None:
    """Kill the remaining processes. Raises RuntimeError if they do not end."""
    deadline = time.monotonic() + GONE_S
    while left := list(find(mark)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {[folder.name for folder in left]} do not end")
        for folder in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.1)
