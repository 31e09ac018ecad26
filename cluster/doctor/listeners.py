"""The ports on which this machine or a node listens, and how they are protected."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster import auth
from cluster.doctor.finding import Finding

# Serve's ports for clients: those of replicas, and those of Ray's own proxy.
CLIENT_PORTS = (range(30000, 31001), range(40000, 41001), (8500, 9500))
# Ray's processes that expose metrics over HTTP.
METRICS = ("DashboardAgent", "dashboard.py", "monitor.py")
OPEN = "open: anyone who can reach it can run code"
READABLE = "open: metrics"


def listening(found: Sequence[Mapping[str, Any]], where: str) -> Iterator[Finding]:
    """Yield one finding for each process of Ray, Serve and HAProxy: its ports and protection.

    found: the entries of `node_checks.listeners`. where: "here" or "on NODE", for the table.
    """
    by_process: dict[str, dict[str, list[str]]] = {}
    for each in found:
        kinds = by_process.setdefault(each["process"], {})
        places = kinds.setdefault(protection(each), [])
        places.append(f"{each['host']}:{each['port']}")
    for process, kinds in by_process.items():
        words = "; ".join(f"{', '.join(places)} ({kind})" for kind, places in kinds.items())
        remedy = ""
        if OPEN in kinds:
            remedy = f"unset {auth.MODE} before Ray starts, or block the ports with a firewall"
        elif READABLE in kinds:
            remedy = "block the port with a firewall; see 'Which ports are open' in docs"
        yield Finding(f"{process} {where}", words, remedy, required=False)


def protection(listener: Mapping[str, Any]) -> str:
    """Return how a listener is protected, or who can use it.

    listener: an entry of `node_checks.listeners`.
    """
    host, port, process = listener["host"], listener["port"], listener["process"]
    is_serve = process in ("ServeReplica", "ProxyActor")
    if host.startswith("127.") or host == "::1":
        return "this machine only"
    if process == "haproxy" or (is_serve and any(port in ports for ports in CLIENT_PORTS)):
        return "for clients: the server's keys"
    if process in METRICS and host == "0.0.0.0":
        return READABLE
    if listener["auth"] != "token":
        return OPEN
    if process == "RayTrainWorker":
        return "Ray's token; torch's store and Gloo are unprotected"
    return "Ray's token"
