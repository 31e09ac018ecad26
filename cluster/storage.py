"""Where runs, bundles and the model registry are kept: a local path or any fsspec URL."""

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import private
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


def resolve(path: str) -> str:
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


def join(root: str, *parts: str) -> str:
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


@contextmanager
def writing(place: str) -> Iterator[None]:
    """Turn what the file system says of a place that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{place}' cannot be written: {error.strerror or error}; give another --storage.path."
        ) from error


@contextmanager
def written_whole(
    target: str, last: str, *, check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a folder to write in; when the block ends well it becomes `target`, else it goes.

    last: the file whose presence tells a reader that the rest is there.
    check: called before that one appears; what it raises prevents it. If `target` has appeared
    meanwhile, that one stays: equal names mean equal content.
    """
    parent = None if is_url(target) else Path(target).parent
    if parent:
        with writing(str(parent)):
            parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="part-", dir=parent, ignore_cleanup_errors=True
    ) as name:
        aside = Path(name)
        aside.chmod(0o755)
        yield aside
        assert (aside / last).exists(), f"{last} was not written"
        if is_url(target):
            fs, path = filesystem(target)
            rest = [file for file in aside.rglob("*") if file.is_file() and file.name != last]
            for file in rest:
                fs.put_file(str(file), join(path, file.relative_to(aside).as_posix()))
            check()
            fs.put_file(str(aside / last), join(path, last))
        else:
            check()
            try:
                aside.rename(target)
            except OSError:
                if not (Path(target) / last).exists():
                    raise


def write_file(url: str, content: bytes, mode: int | None = None) -> None:
    """Write a small file, whole or not at all; several may write it at once.

    mode: permissions of a local file, before its content is there; the user's default if None.
    """
    fs, path = filesystem(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    part = f"{path}.part-{secrets.token_hex(4)}"
    try:
        if mode is not None and not is_url(url):
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        fs.pipe_file(part, content)
        fs.mv(part, path)
    except BaseException:
        with suppress(Exception):  # what went wrong first is what is told
            fs.rm_file(part)
        raise


@contextmanager
def scratch(parent: str) -> Iterator[str]:
    """Yield a folder's path or URL below `parent`, for files that go when the block ends."""
    folder = join(parent, f".scratch-{secrets.token_hex(6)}")
    fs, path = filesystem(folder)
    try:
        yield folder
    finally:
        if fs.exists(path):
            fs.rm(path, recursive=True)


def fetch(source: str, last: str) -> Path:
    """Return a local directory with the content of `source`.

    A local path is returned as it is; a URL is copied to a temporary directory once.
    Raises UserError where the source is not whole, or has a file whose name leads out of it.
    """
    if not is_url(source):
        return Path(source)
    digest = hashlib.sha256(source.encode()).hexdigest()[:20]
    target = private.folder("fetched") / digest
    if not (target / last).exists():
        fs, source_path = filesystem(source)
        base = source_path.rstrip("/") + "/"
        found = fs.find(base)
        if f"{base}{last}" not in found:
            raise UserError(f"'{source}' is not there, or not whole: it has no {last}.")
        with written_whole(str(target), last) as aside:
            fs.get(found, [str(_below(aside, name, base)) for name in found])
    return target


def _below(folder: Path, name: str, base: str) -> Path:
    """Where a file that is called `name` in its file system, below `base`, goes in a folder.

    Raises UserError for a name that leads out of it: whoever writes the source chose it.
    """
    parts = name.removeprefix(base).split("/")
    if not name.startswith(base) or not parts[-1] or {"", ".", ".."} & set(parts):
        raise UserError(f"'{base}' has a file '{name[:200]}', whose name leads out of it.")
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def tracking_uri(root: str) -> str:
    """MLflow's tracking URI: MLFLOW_TRACKING_URI, or SQLite under a local storage root."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if is_url(root):
        raise UserError(
            f"storage.path is '{root}' and MLFLOW_TRACKING_URI is not set; "
            "the embedded registry needs a local path. Set MLFLOW_TRACKING_URI to a server."
        )
    with writing(root):
        Path(root).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root}/{REGISTRY}"


def has_registry(root: str) -> bool:
    """Whether there is a registry to read: a server is named, or the embedded one was made."""
    return "MLFLOW_TRACKING_URI" in os.environ or Path(root, REGISTRY).exists()
