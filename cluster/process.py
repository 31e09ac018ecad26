"""Processes of nodes that share a machine: what each has for itself, and which are whose."""

import shlex
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def own_files(folder: Path, command: list[str]) -> str:
    """The shell command that runs another where what machines have each for itself is its own."""
    lines = []
    for shared in ("ray", "haproxy-serve"):
        place, own = Path("/tmp", shared), folder / shared
        place.mkdir(exist_ok=True)
        own.mkdir()
        lines.append(shlex.join(["mount", "--bind", str(own), str(place)]))
    return " && ".join([*lines, f"exec {shlex.join(command)}"])


def own_haproxy(folder: Path) -> dict[str, str]:
    """Several HAProxies on one network share its port, but not their files."""
    prefix = "RAY_SERVE_HAPROXY_"
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    return {
        f"{prefix}CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        f"{prefix}SOCKET_PATH": str(folder / "admin.sock"),
        f"{prefix}SERVER_STATE_BASE": str(folder),
        f"{prefix}SERVER_STATE_FILE": str(folder / "server-state"),
        f"{prefix}METRICS_PORT": str(ports[0]),
        f"{prefix}STATS_PORT": str(ports[1]),
    }


def environments() -> Iterator[tuple[int, list[str]]]:
    """Every process of ours that can be looked at, and its environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if words != [""]:
                    yield int(folder.name), words
