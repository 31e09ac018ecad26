"""Checks that run on a node, for the doctor.

This module and `haproxy_config` are sent to the node, which may not have this project installed.
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

# mlflow-skinny is the part of MLflow that training and serving share.
PACKAGES = ("ray", "torch", "onnxruntime", "mlflow-skinny")
# Must be set on every node before Ray starts; see `cluster.serve_environment`.
INGRESS = "RAY_SERVE_ENABLE_HA_PROXY"


def inspect_node(storage_root: str | None, nonce: str, ports: tuple[int, ...]) -> dict[str, Any]:
    """Return this node's versions, resources and problems, as plain values.

    storage_root: a folder or URL in which the driver has created a file named `nonce`; None to
    skip this check. ports: those to report if a program listens on them.
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
    """Return the TCP ports on which this user's Ray, Serve and HAProxy listen on this node.

    Each entry has "process", Ray's name such as raylet or ServeReplica; "host"; "port"; and
    "auth", the process's RAY_AUTH_MODE.
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
        except psutil.Error:  # the process has ended, or belongs to another user
            continue
    return sorted(found, key=lambda each: (each["process"], each["port"]))


def _auth(process: Any) -> str:
    """Return a process's RAY_AUTH_MODE, or its parent's if the process title overwrote its own."""
    for each in filter(None, (process, process.parent())):
        if mode := each.environ().get("RAY_AUTH_MODE"):
            return str(mode)
    return "unset"


def _kind(process: Any) -> str | None:
    """Return the name of a process for `listeners`; None if it does not belong to Ray."""
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
    """Return the import path of the callback that binds Serve's proxies here, "" if not set."""
    return os.environ.get("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "")


def tls_certificate() -> str:
    """Return the path of HAProxy's certificate on this node, "" if it does not use TLS."""
    return os.environ.get("HALYARD_TLS_CERT", "")


def node_time() -> float:
    """Return the time of this node's clock, in seconds since 1970."""
    return time.time()


def storage_problem(root: str, nonce: str) -> str:
    """Return why this node cannot read the driver's file or write next to it, "" if it can."""
    own = f".probe-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    try:
        if "://" in root:
            import fsspec

            fs, folder = fsspec.url_to_fs(root)
            try:
                fs.info(f"{folder}/{nonce}")  # `exists` is also false if there is no answer
            except FileNotFoundError:
                return "cannot see files written by other machines"
            fs.pipe_file(f"{folder}/{own}", b"")
            fs.rm_file(f"{folder}/{own}")
        else:
            try:
                os.stat(os.path.join(root, nonce))
            except FileNotFoundError:
                return "cannot see files written by other machines"
            with open(os.path.join(root, own), "x"):
                pass
            os.unlink(os.path.join(root, own))
    except Exception as error:  # each file system has its own kinds of errors
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
    """Return whether a program listens on a port. host: "" for all addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
