"""Commit files and folders, so that a write reported as done is complete and stays; fetch them.

On local paths what is written goes to a name beside its target, is synced to disk, renamed onto
the target and read back; the folder that holds it is synced too. A process that dies at any point,
or a machine that loses power, leaves the target as it was before or complete. At URLs a folder's
files are uploaded before the one that marks it complete, and read back by their sizes.
"""

import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cluster import private
from cluster.errors import UserError
from cluster.storage import filesystem, is_url, join_path, storage_errors

# Written last into a folder: the SHA-256 of each other file, by name.
DIGESTS = "digests.json"
PART_PREFIX = "part-"
# What object stores, HTTP servers and file systems tell of a file's version, by their names.
VERSIONS = ("ETag", "etag", "md5Hash", "content_hash", "LastModified", "last_modified", "mtime")


class DamagedFile(Exception):
    """A committed file that is missing or differs from its digest. The message names it."""


class IncompleteFolder(UserError):
    """A folder at a URL that has not the file which marks it complete."""


def file_digest(path: Path) -> str:
    """SHA-256 of a local file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def committed_files(folder: Path) -> list[str]:
    """Names of the files of a committed local folder. Raises DamagedFile."""
    return sorted(_read_digests(folder))


def check_file(folder: Path, name: str) -> None:
    """Compare a file of a committed local folder with its digest. Raises DamagedFile."""
    try:
        differs = file_digest(folder / name) != _read_digests(folder).get(name)
    except OSError as error:
        raise DamagedFile(f"'{folder / name}' cannot be read ({error.strerror})") from error
    if differs:
        raise DamagedFile(f"'{folder / name}' differs from its digest")


def check_folder(folder: Path) -> None:
    """Compare all files of a committed local folder with their digests. Raises DamagedFile."""
    for name in committed_files(folder):
        check_file(folder, name)


def is_whole(folder: Path) -> bool:
    """Whether a committed local folder is there, complete and undamaged."""
    try:
        check_folder(folder)
    except DamagedFile:
        return False
    return True


def _read_digests(folder: Path) -> dict[str, str]:
    try:
        digests: dict[str, str] = json.loads((folder / DIGESTS).read_text())
        assert isinstance(digests, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise DamagedFile(f"'{folder / DIGESTS}' is missing or damaged") from error
    return digests


@contextmanager
def atomic_folder(
    target: str,
    *,
    last: str = DIGESTS,
    whole: Callable[[Path], bool] = is_whole,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Yield a folder to write in, which becomes `target` when the block ends without an error.

    last: the file that marks the folder complete. The list of digests is written here; another
    file is written by the block.
    whole: whether a local folder is complete and undamaged. A target that is stays as it is,
    since equal names mean equal content; one that is not is replaced.
    check: called before the target appears; what it raises prevents that.

    Raises OSError where the folder cannot be written or does not read back; UserError where its
    parent cannot be made.
    """
    parent = None if is_url(target) else Path(target).parent
    if parent:
        with storage_errors(str(parent)):
            make_folder(parent)
    with tempfile.TemporaryDirectory(
        prefix=PART_PREFIX, dir=parent, ignore_cleanup_errors=True
    ) as part:
        aside = Path(part, "new")
        aside.mkdir(mode=0o755)
        yield aside
        files = sorted(
            path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()
        )
        if last == DIGESTS:
            digests = {name: file_digest(aside / name) for name in files}
            (aside / DIGESTS).write_text(json.dumps(digests))
        assert (aside / last).exists(), f"{last} was not written"
        if parent is None:
            _upload(aside, [name for name in files if name != last], last, target, check)
        else:
            sync_tree(aside)
            check()
            _replace_folder(aside, Path(target), whole)


def _upload(
    aside: Path, names: list[str], last: str, target: str, check: Callable[[], None]
) -> None:
    fs, path = filesystem(target)
    for name in names:
        fs.put_file(str(aside / name), join_path(path, name))
    check()
    fs.put_file(str(aside / last), join_path(path, last))
    fs.invalidate_cache()
    for name in (*names, last):
        size, wanted = fs.size(join_path(path, name)), (aside / name).stat().st_size
        if size != wanted:
            raise OSError(
                errno.EIO, f"'{join_path(target, name)}' has {size} bytes of {wanted} written"
            )


def _replace_folder(aside: Path, target: Path, whole: Callable[[Path], bool]) -> None:
    if target.exists() and not whole(target):
        # Out of the way; it goes with the folder that `aside` is in.
        with suppress(FileNotFoundError):  # another process did the same
            target.rename(aside.with_name("replaced"))
    try:
        aside.rename(target)
    except OSError:
        # Another process has committed the same content meanwhile.
        if not whole(target):
            raise
    sync_folder(target.parent)
    if not whole(target):
        raise OSError(errno.EIO, f"'{target}' does not read back as it was written")


@contextmanager
def atomic_file(url: str, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yield a stream whose content appears at a path or URL when the block ends without an error.

    Readers see the file before or after it; several processes may write it at once.
    mode: permissions of a local file, before its content is there; the user's default if None.
    Raises OSError where it cannot be written or does not read back.
    """
    fs, path = filesystem(url)
    folder, _, name = path.rpartition("/")
    # Readers of folders of Parquet files pass over names that begin with an underscore.
    part = f"{folder}/_{name}.{PART_PREFIX}{secrets.token_hex(4)}"
    local = not is_url(url)
    if local:
        make_folder(Path(folder))
    else:
        fs.makedirs(folder, exist_ok=True)
    try:
        if local and mode is not None:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        with open(part, "wb") if local else fs.open(part, "wb") as stream:
            yield stream
            size = stream.tell()
            if local:
                stream.flush()
                os.fsync(stream.fileno())
        if local:
            os.replace(part, path)
            sync_folder(Path(path).parent)
        else:
            fs.mv(part, path)
            fs.invalidate_cache()
            if (found := fs.size(path)) != size:
                raise OSError(errno.EIO, f"'{url}' has {found} bytes of {size} written")
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            fs.rm_file(part)
        raise


def write_atomic(url: str, content: bytes, mode: int | None = None) -> None:
    """Write a small file, complete or not at all; see `atomic_file`."""
    with atomic_file(url, mode) as stream:
        stream.write(content)


def create_file(url: str, content: bytes) -> bool:
    """Write a small file that does not exist yet; return False where it does. Raises OSError."""
    fs, path = filesystem(url)
    if is_url(url):
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with suppress(FileExistsError):
            # Exclusive where the store knows conditional writes, as S3 does.
            fs.pipe_file(path, content, mode="create")
            return True
        return False
    part = f"{path}.{PART_PREFIX}{secrets.token_hex(4)}"
    write_atomic(part, content)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(part)
    try:
        sync_folder(Path(path).parent)
    except OSError:
        os.unlink(path)  # it is reported as not written
        raise
    return True


def make_folder(folder: Path) -> None:
    """Make a local folder and its parents where they do not exist, on disk. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Have every file and folder below a local folder, and itself, on disk. Raises OSError."""
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Have the names in a local folder, or a file's content, on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fetch(source: str, last: str) -> Path:
    """Return a local folder with the content of `source`.

    A URL is copied to a private folder, once for each version of its files.
    last: the file that marks the source complete.
    Raises IncompleteFolder where it is, UserError for a file whose name leads out of it, OSError.
    """
    if not is_url(source):
        return Path(source)
    fs, source_path = filesystem(source)
    base = source_path.rstrip("/") + "/"
    fs.invalidate_cache()
    found = fs.find(base, detail=True)
    if f"{base}{last}" not in found:
        raise IncompleteFolder(f"'{source}' is not there, or is incomplete: it has no {last}.")
    versions = [[name, *_version(fs, name, info)] for name, info in sorted(found.items())]
    key = hashlib.sha256(json.dumps([source, versions]).encode()).hexdigest()[:32]
    target = private.private_folder("fetched") / key
    if not (target / DIGESTS).exists():
        with atomic_folder(str(target)) as aside:
            copies = [str(_below(aside / "content", name, base)) for name in found]
            fs.get(list(found), copies)
    return target / "content"


def _version(fs: Any, name: str, info: dict[str, Any]) -> list[str]:
    """A file's size and version; both change with its content where the server tells them."""
    if not any(info.get(key) for key in VERSIONS):
        info = fs.info(name)
    return [str(info.get("size")), *(str(info[key]) for key in VERSIONS if info.get(key))]


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
