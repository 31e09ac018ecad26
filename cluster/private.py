"""A folder on this machine that only this user can enter."""

import os
import stat
from pathlib import Path

from cluster.errors import Failed

# Not the system's temporary folder: paths of sockets have at most 107 bytes, and Ray's are long.
PARENT = Path("/tmp")


def root() -> Path:
    """Return the path of this user's folder, which may not exist yet."""
    return PARENT / f"halyard-{os.getuid()}"


def folder(name: str) -> Path:
    """Return `name` below this user's folder, made where it does not exist, with mode 0700.

    Raises Failed where another user owns the folder: it may have been put there to be used.
    """
    for path in (root(), root() / name):
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Failed(f"'{path}' is not a folder of this user; remove it.")
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    return root() / name
