"""What only this user may read, write or hear of: a folder, and libraries that report to nobody."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from cluster.errors import CommandFailed

# Not the system's temporary folder: paths of sockets have at most 107 bytes, and Ray's are long.
PARENT = Path("/tmp")

# Libraries that report their use to their makers unless told otherwise. Each may be overridden
# from outside.
NO_TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Names the private key with which bundles are signed when they are registered.
SIGNING_KEY = "HALYARD_SIGNING_KEY"
# Compiled code that torch runs; its default is a folder that any user could have made before.
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def private_root() -> Path:
    """Return the path of this user's folder, which may not exist yet."""
    return PARENT / f"halyard-{os.getuid()}"


def private_folder(name: str) -> Path:
    """Return `name` below this user's folder, made where it does not exist, with mode 0700.

    Raises CommandFailed where another user owns the folder: it may have been put there to be used.
    """
    for path in (private_root(), private_root() / name):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise CommandFailed(f"'{path}' is not a folder of this user; remove it.")
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    return private_root() / name


def set_privacy_environment() -> None:
    """Turn off telemetry, and keep compiled code in this user's folder, unless set already.

    For libraries that read it when they are imported.
    """
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    if COMPILED not in os.environ:
        try:
            os.environ[COMPILED] = str(private_folder("inductor"))
        except CommandFailed:  # the command that needs the folder says so
            os.environ[COMPILED] = str(Path.home() / ".cache" / "halyard" / "inductor")
