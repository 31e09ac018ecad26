"""Where runs, bundles and the model registry are kept: a local path or any fsspec URL."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

DEFAULT_PATH = "runs"
# What a model, a variant or a run may be called, as paths are made of the name.
MODEL_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
REGISTRY = "mlflow.db"
# A job submitted to Ray runs in a copy of the working directory that goes when the job ends.
JOB_COPY_MARK = "/runtime_resources/working_dir_files/"


def is_url(path: str) -> bool:
    return "://" in path


def resolve_path(path: str) -> str:
    """Return `path` as a URL unchanged, or as an absolute local path.

    A relative path starts at the current directory; inside a submitted Ray job, whose current
    directory does not outlive it, at the home directory.
    """
    if is_url(path):
        return path.rstrip("/")
    base = Path.home() if JOB_COPY_MARK in str(Path.cwd()) else Path.cwd()
    return str((base / Path(path).expanduser()).resolve())


def check_name(name: str, pattern: str, what: str) -> str:
    """Return a name that a path may be made of. Raises UserError for another.

    what: the name of the option or the thing, for the message.
    """
    if not re.fullmatch(pattern.removesuffix("$"), name):
        raise UserError(
            f"{what} is '{name[:100]}'; expected letters, digits, '-' and '_' only, such as "
            "'digits'."
        )
    return name


def join_path(root: str, *parts: str) -> str:
    return "/".join([root.rstrip("/"), *parts])


def filesystem(path: str) -> tuple["AbstractFileSystem", str]:
    """Return the fsspec file system of `path` and the path inside it.

    Raises UserError when the URL's kind is unknown or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"'{path}' cannot be opened: {error}") from error


def exists(url: str) -> bool:
    """Whether a file or folder is there. Raises OSError where it cannot be found out.

    fsspec's own `exists` takes any error, of permissions or of the network, for absence.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def list_names(url: str) -> list[str]:
    """Return the names in a folder, sorted; none where there is no folder. Raises OSError."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def read_file(url: str) -> bytes | None:
    """Return the content of a file, or None where there is none. Raises OSError."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        content: bytes = fs.cat_file(path)
    except FileNotFoundError:
        return None
    return content


def remove(url: str) -> None:
    """Remove a file or folder with all that is in it, if it is there. Raises OSError."""
    if exists(url):
        fs, path = filesystem(url)
        fs.rm(path, recursive=True)


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn what the file system says of a place that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{place}' cannot be written: {error.strerror or error}; give another --storage.path."
        ) from error


@contextmanager
def scratch_folder(parent: str) -> Iterator[str]:
    """Yield a folder's path or URL below `parent`, for files that go when the block ends."""
    folder = join_path(parent, f".scratch-{secrets.token_hex(6)}")
    try:
        yield folder
    finally:
        remove(folder)


def tracking_uri(root: str) -> str:
    """MLflow's tracking URI: MLFLOW_TRACKING_URI, or SQLite under a local storage root."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if is_url(root):
        raise UserError(
            f"storage.path is '{root}' and MLFLOW_TRACKING_URI is not set; "
            "the embedded registry needs a local path. Set MLFLOW_TRACKING_URI to a server."
        )
    with storage_errors(root):
        Path(root).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root}/{REGISTRY}"


def has_registry(root: str) -> bool:
    """Whether there is a registry to read: a server is named, or the embedded one was made."""
    return "MLFLOW_TRACKING_URI" in os.environ or Path(root, REGISTRY).exists()
