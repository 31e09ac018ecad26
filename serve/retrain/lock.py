"""A lease: a file that names the process that is retraining, so that only one does at a time."""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster import commit, storage
from cluster.errors import CommandFailed
from cluster.nodes.process_identity import ProcessIdentity


class LockHeld(Exception):
    """Another process holds the lease. The message names it and for how long it has held it."""


@dataclass(frozen=True)
class FileLock:
    """A lease that this process holds. holder: the content of its file."""

    url: str
    holder: dict[str, Any]

    def check(self) -> None:
        """Raise CommandFailed if another process has taken the lease over after it expired."""
        if _read(self.url) != self.holder:
            raise CommandFailed(
                f"the lease '{self.url}' was taken over by another command; this one ends."
            )


@contextmanager
def hold_lock(url: str, hours: float) -> Iterator[FileLock]:
    """Hold the lease at a path or URL within the block.

    hours: age at which a lease is stale. A lease of a process of this host that has ended is stale
    at once. Raises LockHeld if another process holds the lease and it is not stale.
    """
    lease = FileLock(url, _self())
    content = json.dumps(lease.holder).encode()
    if not commit.create_file(url, content):
        other = _read(url)
        if other is not None and not _is_stale(other, hours):
            raise LockHeld(
                f"{other['host']}, process {other['pid']}, has held the lease for "
                f"{(time.time() - other['time']) / 60:.0f} minutes"
            )
        # If several processes take over a stale lease, the last one to write holds it; the others
        # fail in `check`, here or later.
        commit.write_atomic(url, content)
        lease.check()
    try:
        yield lease
    finally:
        if _read(url) == lease.holder:
            fs, path = storage.filesystem(url)
            fs.rm(path)


def _self() -> dict[str, Any]:
    return {
        **ProcessIdentity.current().to_dict(),
        "time": time.time(),
        "token": secrets.token_hex(8),
    }


def _read(url: str) -> dict[str, Any] | None:
    """Return the content of a lease's file; None if there is no file."""
    fs, path = storage.filesystem(url)
    fs.invalidate_cache()
    try:
        holder: dict[str, Any] = json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError:  # damaged
        return {"host": "another host", "pid": 0, "time": fs.modified(path).timestamp()}
    return holder


def _is_stale(holder: dict[str, Any], hours: float) -> bool:
    if time.time() - holder["time"] > hours * 3600:
        return True
    return ProcessIdentity.from_dict(holder).has_ended()
