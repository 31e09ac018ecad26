"""Identities of processes, stored in files so that others can check if a process still runs."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")
# Index of the start time in /proc/PID/stat, counted from the field after the command's name, which
# may contain spaces; field 22 in proc(5).
START_FIELD = 19


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinguished from any other process with the same id, later or elsewhere.

    host: name of the host. machine: its machine id. boot: the id of its current boot. started: the
    start of the process, in clock ticks since boot. The last three are "" or 0 if unknown.
    """

    host: str
    pid: int
    machine: str = ""
    boot: str = ""
    started: int = 0

    @classmethod
    def current(cls) -> Self:
        """Return the identity of this process."""
        pid = os.getpid()
        machine, boot = _read(MACHINE_ID), _read(BOOT_ID)
        return cls(socket.gethostname(), pid, machine, boot, _start_time(pid))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the inverse of `to_dict`. Raises KeyError if host or pid is missing."""
        return cls(
            values["host"],
            values["pid"],
            values.get("machine", ""),
            values.get("boot", ""),
            values.get("started", 0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; False if it is on another host."""
        now = self.current()
        if (self.host, self.machine or now.machine) != (now.host, now.machine):
            return False
        if self.boot not in ("", now.boot):
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # the process belongs to another user
            pass
        return self.started not in (0, _start_time(self.pid) or self.started)


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _start_time(pid: int) -> int:
    stat = _read(Path(f"/proc/{pid}/stat"))
    fields = stat.rpartition(")")[2].split()
    return int(fields[START_FIELD]) if len(fields) > START_FIELD else 0
