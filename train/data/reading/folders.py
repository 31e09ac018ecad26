"""Split folders of a source, hidden files, and errors of reading files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

import pyarrow as pa

from cluster import storage
from cluster.errors import UserError
from train.data.reading.readers import DIGITS, KNOWN

# Accepted names of split folders.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_folders(url: str) -> tuple[dict[str, str], list[str]]:
    """Return the split folders of an image folder, and the names of its other subfolders.

    The split folders are keyed by "train", "valid" and "test". A split folder has a name from
    SPLIT_NAMES and a subfolder for each class. Without a training folder the result is ({}, []).
    Raises UserError, converted from ValueError or OSError, if two folders are the same split or a
    folder cannot be read.
    """
    if url == DIGITS or any(character in url for character in "*?["):
        return {}, []
    with reading_errors(url):
        fs, path = storage.filesystem(url)
        if not fs.isdir(path):
            return {}, []
        found: dict[str, str] = {}
        others: list[str] = []
        for each in fs.ls(path, detail=True):
            name = PurePosixPath(each["name"]).name
            if each["type"] != "directory" or is_hidden(name):
                continue
            has_classes = any(
                part["type"] == "directory" for part in fs.ls(each["name"], detail=True)
            )
            if name.lower() in SPLIT_NAMES and has_classes:
                if other := found.get(SPLIT_NAMES[name.lower()]):
                    raise ValueError(
                        f"'{name}' and '{PurePosixPath(other).name}' are the same split; rename "
                        "one of them"
                    )
                found[SPLIT_NAMES[name.lower()]] = storage.join_path(url, name)
            else:
                others.append(name)
    return (found, sorted(others)) if "train" in found else ({}, [])


@contextmanager
def reading_errors(file: str) -> Iterator[None]:
    """Convert errors of reading `file` to UserError with a one-line message that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{file}' cannot be read: {error.strerror or error}; give a file, folder or glob: "
            f"{KNOWN}."
        ) from error
    except (pa.ArrowException, UnicodeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"'{file}' cannot be read: {problem}") from error


def is_hidden(path: str) -> bool:
    """Return whether a path has a part like .name or _name, which programs use internally."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).parts if part != "/")
