"""Which process wrote a file, so that another one can tell later whether it still runs."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")
# Of /proc/PID/stat, after the command's name, which may hold spaces: proc(5) counts it as 22.
START_FIELD = 19


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinct from any other that gets its process id later or elsewhere.

    host: name of the host. machine: its machine id. boot: id of its last start. started: when the
    process started, in clock ticks since then. The last three are empty or 0 where not known.
    """

    host: str
    pid: int
    machine: str = ""
    boot: str = ""
    started: int = 0

    @classmethod
    def current(cls) -> Self:
        pid = os.getpid()
        machine, boot = _read(MACHINE_ID), _read(BOOT_ID)
        return cls(socket.gethostname(), pid, machine, boot, _start_time(pid))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the identity in what `to_dict` gave. Raises KeyError without host or pid."""
        return cls(
            values["host"],
            values["pid"],
            values.get("machine", ""),
            values.get("boot", ""),
            values.get("started", 0),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def has_ended(self) -> bool:
        """Whether the process is known to have ended; False for one of another host."""
        now = self.current()
        if (self.host, self.machine or now.machine) != (now.host, now.machine):
            return False
        if self.boot not in ("", now.boot):
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
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
