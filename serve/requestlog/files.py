"""Files of a log: small Parquet files in a folder of the storage path, several writers at once.

A file is called by the time at which it was begun, in milliseconds, and random letters: writers
never meet, and clocks that differ only order them differently. A file that is still small is
written again under its name with the next rows, whole as the first time, so that few requests do
not make many files.
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
# What people asked is for the server's own user.
PRIVATE = 0o600
SUFFIX = ".parquet"
# A file below this size and age is written again with the next rows.
SMALL_BYTES, YOUNG_S = 256 * 1024, 3600
DAY_S = 86_400


def log_folder(root: str, kind: str, model: str) -> str:
    return storage.join_path(root, kind, model)


@dataclass(frozen=True)
class LogFile:
    """A file of a log. path: inside its file system."""

    path: str
    size_bytes: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def time_s(self) -> float:
        """When it was begun, by the clock of its writer; 0 for what is none of ours."""
        # A part of a file that is being written has an underscore before its name.
        digits = self.name.removeprefix("_").partition("-")[0]
        return int(digits) / 1e3 if digits.isdecimal() else 0.0


def list_files(folder: str) -> list[LogFile]:
    """The files of a folder, the oldest first; none where there is no folder. Raises OSError."""
    fs, path = storage.filesystem(folder)
    # Other machines write there too.
    fs.invalidate_cache(path)
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    files = [LogFile(each["name"], each["size"]) for each in found if each["type"] == "file"]
    return sorted((file for file in files if SUFFIX in file.name), key=lambda file: file.name)


class LogWriter:
    """Appends tables to one log of a model. Belongs to one thread."""

    def __init__(self, root: str, kind: str, model: str, file_rows: int) -> None:
        self._folder = log_folder(root, kind, model)
        self._file_rows = file_rows
        self._name, self._table = "", None
        self._begun_s = 0.0

    def append(self, table: pa.Table, now_s: float) -> None:
        """Raises OSError and what a file system raises besides; what was there before, stays."""
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
        """The rows of the last file and the new ones, where they belong into one file."""
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
    """Delete the oldest files of a model's logs that are too old, or too many in bytes.

    Returns how many bytes each log has left. Raises OSError.
    """
    logs = {kind: list_files(log_folder(root, kind, model)) for kind in (REQUESTS, FEEDBACK)}
    left = {kind: sum(file.size_bytes for file in files) for kind, files in logs.items()}
    both = [(file, kind) for kind, files in logs.items() for file in files]
    fs, _ = storage.filesystem(root)
    for file, kind in sorted(both, key=lambda each: each[0].name):
        if file.name.endswith(SUFFIX):
            goes = sum(left.values()) > max_bytes or file.time_s < now_s - keep_s
        else:  # not whole: being written, or left by a writer that was killed
            goes = file.time_s < now_s - DAY_S
        if not goes:
            continue
        with suppress(FileNotFoundError):  # another replica was first
            fs.rm_file(file.path)
        left[kind] -= file.size_bytes
    return left


def read_log_tables(folder: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """What a folder's files hold, the newest first, all columns by default.

    Raises OSError where the folder cannot be read. A damaged file is told of and passed over.
    """
    fs, _ = storage.filesystem(folder)
    for file in reversed(list_files(folder)):
        if not file.name.endswith(SUFFIX):
            continue
        try:
            with fs.open(file.path, "rb") as stream:
                yield readers.open_parquet(stream).read(columns)
        except FileNotFoundError:  # retention deleted it meanwhile
            continue
        except ValueError as error:
            logger.warning("%s cannot be read and is passed over: %s", file.path, error)


def wall_clock() -> float:
    """Seconds since 1970, by this machine's clock."""
    return time.time()
