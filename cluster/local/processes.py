"""Processes of nodes that share a machine: what each has for itself, and which are whose."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def with_private_tmp(folder: Path, command: list[str]) -> str:
    """The shell command that runs another with a folder of its own for Ray's temporary files."""
    shared, own = Path("/tmp/ray"), folder / "ray"
    shared.mkdir(exist_ok=True)
    own.mkdir()
    mount = shlex.join(["mount", "--bind", str(own), str(shared)])
    return f"{mount} && exec {shlex.join(command)}"


def process_environments() -> Iterator[tuple[int, list[str]]]:
    """Every process of ours that can be looked at, and its environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if words != [""]:
                    yield int(folder.name), words
