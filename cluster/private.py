"""Privacy: a folder that only this user can access, and libraries without telemetry."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from cluster.errors import CommandFailed

# Not TMPDIR, which may be long: paths of sockets have at most 107 bytes, and Ray's are long.
PARENT = Path("/tmp")

# Turns off the usage reports of libraries. Values that are already in the environment take
# precedence.
NO_TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# The private key, or its path, with which bundles are signed when they are registered.
SIGNING_KEY = "HALYARD_SIGNING_KEY"
# Folder of torch's compiled code. By default, another user could have created it beforehand.
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def private_root() -> Path:
    """Return the path of this user's folder, which may not exist yet."""
    return PARENT / f"halyard-{os.getuid()}"


def private_folder(name: str) -> Path:
    """Return the folder `name` in this user's folder; both are created if missing, with mode 0700.

    Raises CommandFailed if another user owns one of them, perhaps to read or change its files.
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
    """Turn off telemetry, and store compiled code in this user's folder, unless set already.

    Call it before the libraries are imported, because they read the variables on import.
    """
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    if COMPILED not in os.environ:
        try:
            os.environ[COMPILED] = str(private_folder("inductor"))
        except CommandFailed:  # reported by the command that needs the folder
            os.environ[COMPILED] = str(Path.home() / ".cache" / "halyard" / "inductor")
