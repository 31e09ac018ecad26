"""Storage of runs, bundles and the model registry: a local path or any fsspec URL."""

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
# Names of models, variants and runs are restricted because they become parts of paths.
MODEL_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
REGISTRY = "mlflow.db"
# A Ray job runs in a copy of the working directory, which is deleted when the job ends.
JOB_COPY_MARK = "/runtime_resources/working_dir_files/"


def is_url(path: str) -> bool:
    return "://" in path


def resolve_path(path: str) -> str:
    """Return a URL without a slash at its end, or a local path as an absolute path.

    A relative path starts at the current directory. In a submitted Ray job it starts at the home
    directory, because the job's current directory is deleted when the job ends.
    """
    if is_url(path):
        return path.rstrip("/")
    base = Path.home() if JOB_COPY_MARK in str(Path.cwd()) else Path.cwd()
    return str((base / Path(path).expanduser()).resolve())


def check_name(name: str, pattern: str, what: str) -> str:
    """Return a name that is safe to use in paths. Raises UserError if it is not.

    what: the option or thing that has this name, for the message.
    """
    if not re.fullmatch(pattern.removesuffix("$"), name):
        raise UserError(
            f"{what} is '{name[:100]}'; expected letters, digits, '-' and '_' only, such as "
            "'digits'."
        )
    return name


def join_path(root: str, *parts: str) -> str:
    """Return a path or URL with further parts."""
    return "/".join([root.rstrip("/"), *parts])


def filesystem(path: str) -> tuple["AbstractFileSystem", str]:
    """Return the fsspec file system of `path` and the path inside it.

    Raises UserError if the URL's scheme is unknown or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"'{path}' cannot be opened: {error}") from error


def exists(url: str) -> bool:
    """Return whether a file or folder exists. Raises OSError if that cannot be determined.

    fsspec's own `exists` returns False for any error, such as a lack of permission.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def list_names(url: str) -> list[str]:
    """Return the sorted names in a folder; none if it does not exist. Raises OSError."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def read_file(url: str) -> bytes | None:
    """Return the content of a file, or None if it does not exist. Raises OSError."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        content: bytes = fs.cat_file(path)
    except FileNotFoundError:
        return None
    return content


def remove(url: str) -> None:
    """Remove a file, or a folder with its content, if it exists. Raises OSError."""
    if exists(url):
        fs, path = filesystem(url)
        fs.rm(path, recursive=True)


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn an OSError in the block into a UserError: the place cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{place}' cannot be written: {error.strerror or error}; give another --storage.path."
        ) from error


@contextmanager
def scratch_folder(parent: str) -> Iterator[str]:
    """Yield the path or URL of a folder below `parent` that is removed when the block ends."""
    folder = join_path(parent, f".scratch-{secrets.token_hex(6)}")
    try:
        yield folder
    finally:
        remove(folder)


def tracking_uri(root: str) -> str:
    """Return MLflow's tracking URI: MLFLOW_TRACKING_URI, or SQLite under a local storage root.

    Raises UserError if the root is a URL and MLFLOW_TRACKING_URI is not set.
    """
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
    """Return whether a registry exists: a server is named, or there is an embedded one."""
    return "MLFLOW_TRACKING_URI" in os.environ or Path(root, REGISTRY).exists()
