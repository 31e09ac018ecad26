"""What listens on this machine or a node, and what protects it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster import auth
from cluster.doctor.finding import Finding

# Clients' ports of Serve: those of replicas, and those of Ray's own proxy.
CLIENT_PORTS = (range(30000, 31001), range(40000, 41001), (8500, 9500))
# Ray's processes that show their metrics by HTTP.
METRICS = ("DashboardAgent", "dashboard.py", "monitor.py")
OPEN = "open: whoever reaches it can run code"
READABLE = "open: metrics"


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
            remedy = f"unset {auth.MODE} before Ray starts, or close them by a firewall"
        elif READABLE in kinds:
            remedy = "close it by a firewall; see the README, 'Who reaches what'"
        yield Finding(f"{process} {where}", words, remedy, required=False)


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
