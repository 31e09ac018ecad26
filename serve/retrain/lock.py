"""A lease: a file that says who is at work, so that one is at a time."""

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
    """Another is at work. The message says who, and since when."""


@dataclass(frozen=True)
class FileLock:
    """A lease that this process took. holder: what its file holds."""

    url: str
    holder: dict[str, Any]

    def check(self) -> None:
        """Raises CommandFailed where another took it over meanwhile, as it had become stale."""
        if _read(self.url) != self.holder:
            raise CommandFailed(
                f"the lease '{self.url}' was taken over by another; this command ends."
            )


@contextmanager
def hold_lock(url: str, hours: float) -> Iterator[FileLock]:
    """Hold the lease at a path or URL within the block.

    hours: after which a lease is stale; at once where its process ran on this host and is gone.
    Raises LockHeld.
    """
    lease = FileLock(url, _self())
    content = json.dumps(lease.holder).encode()
    if not commit.create_file(url, content):
        other = _read(url)
        if other is not None and not _is_stale(other, hours):
            raise LockHeld(
                f"{other['host']}, process {other['pid']}, has been at it for "
                f"{(time.time() - other['time']) / 60:.0f} minutes"
            )
        # Of several that find it stale, the last to write has it, and the others find that out.
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
    """What a lease's file holds; None if there is none."""
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
