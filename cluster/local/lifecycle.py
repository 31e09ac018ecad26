"""Start and stop a cluster of several nodes on this machine."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import auth, connect, serve_environment
from cluster.errors import CommandFailed, UserError
from cluster.local import network_namespace
from cluster.local.cluster import (
    HEAD,
    LOOPBACK,
    Cluster,
    certificates_home,
    cluster_home,
    write_note,
)
from cluster.local.node_certificates import issue_certificates


def up(
    num: int,
    cpus: int,
    *,
    port: int = 6379,
    dashboard_port: int = 8265,
    isolate: bool = True,
    tls: bool = False,
    head_cpus: int | None = None,
    environment: Mapping[str, str] | None = None,
    head_environment: Mapping[str, str] | None = None,
) -> Cluster:
    """Start `num` nodes with `cpus` CPUs each; return when Ray lists all of them as alive.

    isolate: whether each node gets its own network, if possible. tls: whether the nodes use TLS
    between each other. head_cpus: CPUs of the head, if different. environment: variables added to
    the environment of all nodes. head_environment: variables of the head only.
    Raises UserError if a cluster is up, a port is taken or this is not Linux; CommandFailed if a
    node does not start.
    """
    if not Path("/proc/self/environ").exists():
        raise UserError(
            "several nodes on one machine require Linux; on this system, commands start a local "
            "Ray instead."
        )
    if (running := current()) is not None:
        raise UserError(
            f"a cluster of {len(running.names)} nodes is up at {running.address}; "
            "python -m cluster down stops it."
        )
    from ray.util import get_node_ip_address

    serve_environment.prepare_local_serving()
    problem = network_namespace.problem() if isolate else "not requested"
    # Not loopback: with several nodes, Ray replaces it by the machine's own address.
    host = get_node_ip_address() if problem else network_namespace.node_address(0)
    names = [HEAD, *(f"node{index}" for index in range(1, num))]
    cluster = Cluster(
        secrets.token_hex(4),
        host,
        cpus,
        port,
        dashboard_port,
        problem is None,
        names,
        cpus if head_cpus is None else head_cpus,
        os.environ[auth.MODE],
        dict(environment or {}),
        dict(head_environment or {}),
        tls,
    )
    for each in (port, dashboard_port):
        connect.check_port_free(LOOPBACK, each)
    if problem and isolate:
        print(
            f"the nodes cannot have separate networks ({problem}); they share this machine's.",
            file=sys.stderr,
        )
    if not auth.enabled():
        print(
            f"anyone who can reach {host} can run code there, because {auth.MODE} is "
            f"{os.environ[auth.MODE]}; unset it to require a token.",
            file=sys.stderr,
        )
    down()
    shutil.rmtree(cluster_home(), ignore_errors=True)
    cluster_home().mkdir(mode=0o700)
    if tls:
        issue_certificates(
            certificates_home(), {name: cluster.node_address(name) for name in names}
        )
    if cluster.isolated:
        network_namespace.create_bridge()
    write_note(cluster)
    try:
        for together in ([HEAD], names[1:]):
            wait_for({name: cluster.start(name) for name in together}, cluster)
    except BaseException:
        down()
        raise
    return cluster


def down() -> int:
    """Stop the cluster and delete its files; return the number of nodes that were running."""
    cluster = _noted()
    if cluster is None:
        return 0
    was_up = bool(cluster.processes())
    for name in reversed(cluster.names):
        cluster.end(name)
        if cluster.isolated:
            network_namespace.disconnect_node(name)
    if cluster.isolated:
        network_namespace.remove_bridge()
    cluster.forget_head()
    shutil.rmtree(cluster_home(), ignore_errors=True)
    return len(cluster.names) if was_up else 0


def current() -> Cluster | None:
    """Return the running cluster, or None. A cluster without processes does not count."""
    cluster = _noted()
    return cluster if cluster is not None and cluster.processes() else None


def _noted() -> Cluster | None:
    """Return the cluster that was started and not stopped, or None.

    Raises UserError if another user may have written the file.
    """
    place = cluster_home()
    try:
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError:
        raise UserError(f"'{place}' is not a folder of this user; remove it.") from None
    try:
        # Read from the folder that was checked, even if its path now leads to another one.
        if os.fstat(folder).st_uid != os.getuid():
            raise UserError(f"'{place}' is not a folder of this user; remove it.")
        note = os.open("cluster.json", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        with open(note) as file:
            return Cluster(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None
    finally:
        os.close(folder)


@contextmanager
def running(num: int, cpus: int, **options: Any) -> Iterator[Cluster]:
    """Yield a cluster that is stopped when the block ends. See `up` for the options."""
    cluster = up(num, cpus, **options)
    try:
        yield cluster
    finally:
        down()


def wait_for(started: Mapping[str, subprocess.Popen[bytes]], cluster: Cluster) -> None:
    """Wait until Ray lists the nodes as alive, and no killed node any more.

    started: the first process of each node, by name. Raises CommandFailed, with the end of its
    log, if a node does not start.
    """
    deadline = time.monotonic() + connect.START_S
    while missing := [name for name in started if name not in cluster.alive()]:
        ended = [name for name in missing if started[name].poll() is not None]
        if ended or time.monotonic() > deadline:
            name = (ended or missing)[0]
            log = (cluster_home() / name / "log").read_text(errors="replace").strip().splitlines()
            raise CommandFailed(f"node '{name}' did not start: {' '.join(log[-3:])[-400:]}")
        time.sleep(0.1)
    while cluster.stale():
        if time.monotonic() > deadline:
            raise CommandFailed(
                "Ray still lists a killed node as alive; run ray status to see which."
            )
        time.sleep(0.1)
