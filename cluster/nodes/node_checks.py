"""Checks of a node for the doctor.

They are sent there together with `haproxy_config`, as a node may not have this project.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from typing import Any

from cluster.ingress.haproxy_config import haproxy_problem

# The full mlflow is for training; what serving has of it is a package that both share.
PACKAGES = ("ray", "torch", "onnxruntime", "mlflow-skinny")
# What Ray Serve needs to know on every node; see `cluster.serve_environment`.
INGRESS = "RAY_SERVE_ENABLE_HA_PROXY"


def inspect_node(storage_root: str | None, nonce: str, ports: tuple[int, ...]) -> dict[str, Any]:
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
        "haproxy": haproxy_problem(),
        "ingress": os.environ.get(INGRESS) == "1",
        "auth": os.environ.get("RAY_AUTH_MODE", "unset"),
        "taken": [port for port in ports if port_is_taken("", port)],
        "listeners": listeners(),
    }


def listeners() -> list[dict[str, Any]]:
    """What Ray, Serve and HAProxy of this user listen on here: {"process", "host", "port", "auth"}.

    process: in the words of Ray, such as raylet or ServeReplica. auth: Ray's mode in it.
    """
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            with process.oneshot():
                name = _kind(process)
                if name is None or process.uids().real != os.getuid():
                    continue
                auth = _auth(process)
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        host = connection.laddr.ip.removeprefix("::ffff:")
                        port = connection.laddr.port
                        found.append({"process": name, "host": host, "port": port, "auth": auth})
        except psutil.Error:  # it has ended, or is another user's
            continue
    return sorted(found, key=lambda each: (each["process"], each["port"]))


def _auth(process: Any) -> str:
    """Ray's mode of authentication in a process; in its parent, where its title hides it."""
    for each in filter(None, (process, process.parent())):
        if mode := each.environ().get("RAY_AUTH_MODE"):
            return str(mode)
    return "unset"


def _kind(process: Any) -> str | None:
    """What a process is called here; None for one that has nothing to do with Ray."""
    command = process.cmdline()
    if not command:
        return None
    name = os.path.basename(command[0])
    if name in ("raylet", "gcs_server", "haproxy"):
        return name
    if name.startswith("ray::"):
        return name.removeprefix("ray::").partition(":")[0].partition(".")[0]
    try:
        with open(f"/proc/{process.pid}/maps") as file:
            uses_ray = "_raylet.so" in file.read()
    except OSError:
        return None
    if not uses_ray:
        return None
    scripts = [os.path.basename(word) for word in command[1:] if not word.startswith("-")]
    return scripts[0] if scripts else name


def gateway_path() -> str:
    """Where Serve's proxies of this node find what binds them to their addresses; "" if nowhere."""
    return os.environ.get("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "")


def tls_certificate() -> str:
    """The certificate with which HAProxy of this node speaks TLS; "" if it speaks none."""
    return os.environ.get("HALYARD_TLS_CERT", "")


def node_time() -> float:
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


def port_is_taken(host: str, port: int) -> bool:
    """Return whether something listens there. host: "" for all addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
