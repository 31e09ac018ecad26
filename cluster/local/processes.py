"""Processes of nodes on the same machine: their private files, and how to identify them."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cluster import ray_internals


def with_private_tmp(folder: Path, command: list[str]) -> str:
    """Return a shell command that runs `command` with a private folder for Ray's temporary files.

    It must run in a mount namespace of its own. folder: the node's folder.
    """
    shared, own = ray_internals.address_file().parent, folder / "ray"
    shared.mkdir(parents=True, exist_ok=True)
    own.mkdir()
    mount = shlex.join(["mount", "--bind", str(own), str(shared)])
    return f"{mount} && exec {shlex.join(command)}"


def process_environments() -> Iterator[tuple[int, list[str]]]:
    """Yield the id and the environment of each process that this user may inspect."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if words != [""]:
                    yield int(folder.name), words
