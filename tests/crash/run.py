"""python -m tests.crash.run SCENARIO FOLDER [MOST]: inject faults at each call; print the outcomes.

Start it with interpose.so in LD_PRELOAD. A scenario writes several versions of a file or folder and
reports each one once it is written. For each of its system calls the scenario runs in a child
process in which that call fails, or the process ends at it, or the machine loses power at it (in
two variants). Afterwards every reported version must exist and everything on disk must be intact.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import UserError

CHILD_S = 60
ENDED = 77
Report = Callable[[int], None]


class Scenario(Protocol):
    def write(self, folder: Path, report: Report) -> None:
        """Write versions 1, 2, … and report each. Raises OSError if one cannot be written."""

    def version(self, folder: Path) -> int:
        """Return the version that a reader finds, 0 if there is none. Raises if it is damaged."""


def inject(scenario: Scenario, place: Path, most: int = sys.maxsize) -> dict[str, object]:
    """Inject each fault at each call, or at `most` evenly spread calls; return the outcomes."""
    calls, reported = _run(scenario, place / "whole", 0, 0)
    assert scenario.version(place / "whole" / "data") == reported > 0
    faults = {
        "ENOSPC": errno.ENOSPC,
        "EIO": errno.EIO,
        "killed": 0,
        "power": 0,
        "power, renames": 0,
    }
    outcomes: dict[str, dict[str, int]] = {}
    problems = []
    for fault, error in faults.items():
        found = {"points": 0, "latest": 0, "earlier": 0}
        points = min(calls, most)
        for number in (1 + point * calls // points for point in range(points)):
            folder = place / f"{fault.partition(',')[0]}-{number}"
            _, reported = _run(scenario, folder, number, error)
            if fault.startswith("power"):
                lose_power(folder, undo_names="renames" in fault)
            try:
                version = scenario.version(folder / "data")
                if version < reported:
                    problems.append(f"{fault} at {number}: {version} after {reported} was reported")
                found["latest" if version == reported else "earlier"] += 1
            except Exception as error_:
                traceback.print_exc()
                problems.append(f"{fault} at {number}: {type(error_).__name__}: {error_}")
            found["points"] += 1
            shutil.rmtree(folder)
        outcomes[fault] = found
    return {"calls": calls, "outcomes": outcomes, "problems": problems}


def _run(scenario: Scenario, folder: Path, number: int, error: int) -> tuple[int, int]:
    """Run a scenario in a child; return its number of calls and the last version it reported."""
    data, saved = folder / "data", folder / "saved"
    data.mkdir(parents=True)
    saved.mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            journal = os.open(folder / "journal", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            library = ctypes.CDLL(None)
            library.interpose_arm(
                str(data).encode(), str(saved).encode(), journal, ctypes.c_long(number), error
            )
            # A scenario is allowed to raise these if a call fails.
            with suppress(OSError, UserError):
                scenario.write(data, lambda version: _tell(writer, f"version {version}"))
            _tell(writer, f"calls {library.interpose_count()}")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    status = _wait(child)
    with os.fdopen(reader) as stream:
        told = [line.split() for line in stream]
    ended = os.waitstatus_to_exitcode(status)
    assert ended in ((ENDED,) if number and not error else (0,)), f"the child ended with {ended}"
    versions = [int(value) for name, value in told if name == "version"]
    calls = [int(value) for name, value in told if name == "calls"]
    return (calls or [0])[0], max(versions, default=0)


def _tell(descriptor: int, line: str) -> None:
    os.write(descriptor, f"{line}\n".encode())


def _wait(child: int) -> int:
    deadline = time.monotonic() + CHILD_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError("the child did not end")


@dataclass
class Name:
    """A new name in a folder, or a rename, that may not be on disk yet.

    inode is that of the named file. left: the folder it was renamed from has been synced since.
    """

    inode: int
    parent: str
    origin: str
    path: str
    other: str
    saved: str
    left: bool = False

    def undo(self) -> None:
        if self.other and not self.left:
            if os.path.lexists(self.other):
                os.rename(self.other, self.path)
        else:
            _remove(self.other or self.path, self.inode)
        if self.saved:
            os.rename(self.saved, self.other)


def _remove(path: str, inode: int) -> None:
    """Remove `path`, unless it now names a file with another inode."""
    if not os.path.lexists(path) or os.lstat(path).st_ino != inode:
        return
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def lose_power(folder: Path, *, undo_names: bool) -> None:
    """Reduce a folder to the data that is certain to be on disk, according to the journal.

    Files that were written after their last sync become empty. With `undo_names`, new names and
    renames in folders that were not synced afterwards are undone; without it, they survive.
    Removals always survive.
    """
    dirty: dict[int, bool] = {}
    names: list[Name] = []
    for line in (folder / "journal").read_text().splitlines():
        operation, inode, parent, origin, path, other, saved = line.split("\t")
        if operation == "write":
            dirty[int(inode)] = True
        elif operation == "sync":
            dirty[int(inode)] = False
            names = [each for each in names if each.parent != inode]
            for each in names:
                each.left |= each.origin == inode
        elif operation in ("create", "rename"):
            names.append(Name(int(inode), parent, origin, path, other, saved))
    if undo_names:
        for name in reversed(names):
            name.undo()
    for path in (folder / "data").rglob("*"):
        if path.is_file() and dirty.get(path.stat().st_ino):
            os.truncate(path, 0)


if __name__ == "__main__":
    from tests.crash.scenarios import SCENARIOS

    name, place, *most = sys.argv[1:]
    print(json.dumps(inject(SCENARIOS[name](), Path(place), *map(int, most))))
