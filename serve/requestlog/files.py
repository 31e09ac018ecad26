"""Files of a log: small Parquet files in a folder of the storage path, written by all replicas.

A file's name is the time at which it was begun, in milliseconds, and random characters. Writers
therefore never use the same name, and clocks that differ only affect the order of files. While a
file is small, it is rewritten atomically with the next rows, so that few requests do not make many
files.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet

from cluster import commit, storage
from train.data.reading import readers

logger = logging.getLogger(__name__)

REQUESTS, FEEDBACK = "requests", "feedback"
# Only the server's user may read logged requests.
PRIVATE = 0o600
SUFFIX = ".parquet"
# A file below this size and age is rewritten with the next rows.
SMALL_BYTES, YOUNG_S = 256 * 1024, 3600
DAY_S = 86_400


def log_folder(root: str, kind: str, model: str) -> str:
    """Return the folder of a model's log. kind: REQUESTS or FEEDBACK."""
    return storage.join_path(root, kind, model)


@dataclass(frozen=True)
class LogFile:
    """A file of a log. path: within its file system."""

    path: str
    size_bytes: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def time_s(self) -> float:
        """When the file was begun, seconds since 1970 by its writer's clock; 0 for other names."""
        # The name of a file that is being written begins with an underscore.
        digits = self.name.removeprefix("_").partition("-")[0]
        return int(digits) / 1e3 if digits.isdecimal() else 0.0


def list_files(folder: str) -> list[LogFile]:
    """Return the files of a folder, oldest first; none if there is no folder. Raises OSError."""
    fs, path = storage.filesystem(folder)
    # Other machines write there too, so a cached listing may be stale.
    fs.invalidate_cache(path)
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    files = [LogFile(each["name"], each["size"]) for each in found if each["type"] == "file"]
    return sorted((file for file in files if SUFFIX in file.name), key=lambda file: file.name)


class LogWriter:
    """Appends tables to one log of a model. Not thread-safe."""

    def __init__(self, root: str, kind: str, model: str, file_rows: int) -> None:
        self._folder = log_folder(root, kind, model)
        self._file_rows = file_rows
        self._name, self._table = "", None
        self._begun_s = 0.0

    def append(self, table: pa.Table, now_s: float) -> None:
        """Write a table. Raises OSError and other errors of the file system; the rows that were
        written before remain.
        """
        whole = self._continued(table, now_s)
        name, begun_s = self._name, self._begun_s
        if whole is None:
            whole, begun_s = table, now_s
            name = f"{int(now_s * 1e3):013}-{secrets.token_hex(4)}{SUFFIX}"
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(whole, sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        commit.write_atomic(storage.join_path(self._folder, name), content, PRIVATE)
        small = len(content) < SMALL_BYTES
        self._name, self._table, self._begun_s = name, whole if small else None, begun_s

    def _continued(self, table: pa.Table, now_s: float) -> pa.Table | None:
        """Return the rows of the last file and the new ones; None if a new file must begin."""
        last = self._table
        if (
            last is None
            or last.schema != table.schema
            or last.num_rows + table.num_rows > self._file_rows
            or not 0 <= now_s - self._begun_s < YOUNG_S
        ):
            return None
        return pa.concat_tables([last, table])


def apply_retention(
    root: str, model: str, max_bytes: int, keep_s: float, now_s: float
) -> dict[str, int]:
    """Delete files that are older than `keep_s` seconds, and the oldest files beyond `max_bytes`.

    Returns the remaining bytes of each log, by REQUESTS and FEEDBACK. Raises OSError.
    """
    logs = {kind: list_files(log_folder(root, kind, model)) for kind in (REQUESTS, FEEDBACK)}
    left = {kind: sum(file.size_bytes for file in files) for kind, files in logs.items()}
    both = [(file, kind) for kind, files in logs.items() for file in files]
    fs, _ = storage.filesystem(root)
    for file, kind in sorted(both, key=lambda each: each[0].name):
        if file.name.endswith(SUFFIX):
            goes = sum(left.values()) > max_bytes or file.time_s < now_s - keep_s
        else:  # incomplete: being written, or left by a writer that was killed
            goes = file.time_s < now_s - DAY_S
        if not goes:
            continue
        with suppress(FileNotFoundError):  # deleted by another replica
            fs.rm_file(file.path)
        left[kind] -= file.size_bytes
    return left


def read_log_tables(folder: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the tables of a folder's files, newest first. columns: None for all.

    Raises OSError if the folder cannot be read. Damaged files are logged and skipped.
    """
    fs, _ = storage.filesystem(folder)
    for file in reversed(list_files(folder)):
        if not file.name.endswith(SUFFIX):
            continue
        try:
            with fs.open(file.path, "rb") as stream:
                yield readers.open_parquet(stream).read(columns)
        except FileNotFoundError:  # deleted by retention in the meantime
            continue
        except ValueError as error:
            logger.warning("%s cannot be read and is skipped: %s", file.path, error)


def wall_clock() -> float:
    """Return the seconds since 1970 by this machine's clock."""
    return time.time()
