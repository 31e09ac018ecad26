"""A copy of the repository, in which the commands of the documentation may write."""

import shutil
import sys
from pathlib import Path

from tests.server import REPOSITORY

COPIED = (
    ".gitignore",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
    *("cluster", "docs", "serve", "train", "tune"),
)
# The only change: benchmarks are short by default, because no test reads their timings.
OPTIONS = "train/config/compression.py"
LONG = "    measure_seconds: float = Field(\n        10,\n"


def copy_repository(folder: Path) -> Path:
    """Copy the repository into `folder`, with a link to the environment; return the folder."""
    for name in COPIED:
        source, target = REPOSITORY / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            shutil.copy(source, target)
    (folder / ".venv").symlink_to(sys.prefix)
    options = (folder / OPTIONS).read_text()
    assert options.count(LONG) == 1
    (folder / OPTIONS).write_text(options.replace(LONG, LONG.replace("10", "0.5")))
    return folder
