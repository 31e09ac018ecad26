"""Write files and folders atomically and durably, and fetch them.

On local paths, content is written next to its target under another name, synced to disk, renamed
to the target and read back; the parent folder is synced too. If the process dies or the machine
loses power at any point, the target is either unchanged or complete. At URLs, a folder's files are
uploaded before the file that marks it complete, and their sizes are checked.
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

# The last file written to a folder: the SHA-256 of each other file, by name.
DIGESTS = "digests.json"
PART_PREFIX = "part-"
# Fields in which object stores, HTTP servers and file systems report the version of a file.
VERSIONS = ("ETag", "etag", "md5Hash", "content_hash", "LastModified", "last_modified", "mtime")


class DamagedFile(Exception):
    """A committed file that is missing or differs from its digest; the message names the file."""


class IncompleteFolder(UserError):
    """A folder at a URL that lacks the file which marks it complete."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a local file in hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def committed_files(folder: Path) -> list[str]:
    """Return the sorted names of a committed local folder's files, or raise DamagedFile."""
    return sorted(_read_digests(folder))


def check_file(folder: Path, name: str) -> None:
    """Compare a committed local file with its digest. Raises DamagedFile if they differ."""
    try:
        differs = file_digest(folder / name) != _read_digests(folder).get(name)
    except OSError as error:
        raise DamagedFile(f"'{folder / name}' cannot be read ({error.strerror})") from error
    if differs:
        raise DamagedFile(f"'{folder / name}' differs from its digest")


def check_folder(folder: Path) -> None:
    """Compare all files of a committed local folder with their digests, or raise DamagedFile."""
    for name in committed_files(folder):
        check_file(folder, name)


def is_whole(folder: Path) -> bool:
    """Return whether a committed local folder exists and is complete and undamaged."""
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
    """Yield a folder to write to, which becomes `target` when the block ends without an error.

    last: the file that marks the folder complete. The list of digests is written by this function;
    any other file must be written by the block.
    whole: whether a local folder is complete and undamaged. A whole target is kept, because equal
    names mean equal content; a damaged one is replaced.
    check: called just before the target appears; if it raises, the target does not appear.
    Raises OSError if the folder cannot be written or reads back differently, UserError if its
    parent cannot be created.
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
                errno.EIO, f"'{join_path(target, name)}' has {size} bytes; {wanted} were written"
            )


def _replace_folder(aside: Path, target: Path, whole: Callable[[Path], bool]) -> None:
    if target.exists() and not whole(target):
        # Move it aside; it is deleted together with the temporary folder that holds `aside`.
        with suppress(FileNotFoundError):  # another process did the same
            target.rename(aside.with_name("replaced"))
    try:
        aside.rename(target)
    except OSError:
        # Another process may have committed the same content in the meantime.
        if not whole(target):
            raise
    sync_folder(target.parent)
    if not whole(target):
        raise OSError(errno.EIO, f"'{target}' reads back differently from what was written")


@contextmanager
def atomic_file(url: str, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yield a stream whose content appears at a path or URL when the block ends without an error.

    Readers see the old file or the complete new one. Several processes may write it at once.
    mode: permissions of a local file, set before its content is written; None for the default.
    Raises OSError if the file cannot be written or reads back with another size.
    """
    fs, path = filesystem(url)
    folder, _, name = path.rpartition("/")
    # Readers of Parquet folders skip names that begin with an underscore.
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
                raise OSError(errno.EIO, f"'{url}' has {found} bytes; {size} were written")
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            fs.rm_file(part)
        raise


def write_atomic(url: str, content: bytes, mode: int | None = None) -> None:
    """Write a small file atomically; see `atomic_file`."""
    with atomic_file(url, mode) as stream:
        stream.write(content)


def create_file(url: str, content: bytes) -> bool:
    """Create a small file; return False if it exists. Raises OSError if it cannot be written."""
    fs, path = filesystem(url)
    if is_url(url):
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with suppress(FileExistsError):
            # Exclusive only in stores with conditional writes, such as S3.
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
        os.unlink(path)  # the error means that the file was not created
        raise
    return True


def make_folder(folder: Path) -> None:
    """Create a local folder and its missing parents, and sync them to disk. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Sync a local folder, and every file and folder below it, to disk. Raises OSError."""
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Sync the entries of a local folder, or the content of a file, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fetch(source: str, last: str) -> Path:
    """Return a local folder with the content of `source`.

    A URL is downloaded to a private folder, once for each version of its files.
    last: the file that marks the source complete. Raises IncompleteFolder if that file is missing,
    UserError if a file's name leads out of the folder, and OSError.
    """
    if not is_url(source):
        return Path(source)
    fs, source_path = filesystem(source)
    base = source_path.rstrip("/") + "/"
    fs.invalidate_cache()
    found = fs.find(base, detail=True)
    if f"{base}{last}" not in found:
        raise IncompleteFolder(f"'{source}' does not exist or is incomplete: it has no {last}.")
    versions = [[name, *_version(fs, name, info)] for name, info in sorted(found.items())]
    key = hashlib.sha256(json.dumps([source, versions]).encode()).hexdigest()[:32]
    target = private.private_folder("fetched") / key
    if not (target / DIGESTS).exists():
        with atomic_folder(str(target)) as aside:
            copies = [str(_below(aside / "content", name, base)) for name in found]
            fs.get(list(found), copies)
    return target / "content"


def _version(fs: Any, name: str, info: dict[str, Any]) -> list[str]:
    """Return the size of a file and, if its server reports them, the fields of its version."""
    if not any(info.get(key) for key in VERSIONS):
        info = fs.info(name)
    return [str(info.get("size")), *(str(info[key]) for key in VERSIONS if info.get(key))]


def _below(folder: Path, name: str, base: str) -> Path:
    """Return the local path, in `folder`, for a file whose remote path `name` is below `base`.

    Raises UserError if the name leads out of the folder: the writer of the source chose the name.
    """
    parts = name.removeprefix(base).split("/")
    if not name.startswith(base) or not parts[-1] or {"", ".", ".."} & set(parts):
        raise UserError(f"the file name '{name[:200]}' leads out of the folder '{base}'.")
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
