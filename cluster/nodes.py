"""A Ray cluster of several nodes on this machine, for tests and trials.

Real raylets, each with its own agents, object store and, where that is permitted, its own network
and temporary files, as if on machines of their own. The head is on this machine's network, so that
commands here join it as they would join any cluster. What is up is kept in a file, so that one
command starts it and another stops it.
"""

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster import auth, connect, ingress, network, process
from cluster.errors import Failed, UserError

HEAD = "head"
LOOPBACK = "127.0.0.1"
# In the environment of every process of a node.
MARK = "HALYARD_NODE"
OBJECT_STORE_BYTES = 256 * 2**20
STOP_S = 15


@dataclass
class Cluster:
    """What is up. Written down after each change."""

    id: str
    host: str
    cpus: int
    port: int
    dashboard_port: int
    isolated: bool
    names: list[str]
    head_cpus: int
    # Ray's mode of authentication that the nodes were started in.
    auth_mode: str = "token"
    # What nodes are started with besides this process's environment, and the head alone.
    environment: dict[str, str] = field(default_factory=dict)
    head_environment: dict[str, str] = field(default_factory=dict)
    # Ray's ids of nodes that were killed: it takes them for alive for some seconds more.
    killed: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is set to."""
        return f"{self.host}:{self.port}"

    @property
    def dashboard(self) -> str:
        """Where `ray job submit --address` goes."""
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What a command needs to use this cluster."""
        token = {auth.PATH: os.environ[auth.PATH]} if auth.PATH in os.environ else {}
        return {"RAY_ADDRESS": self.address, auth.MODE: self.auth_mode, **token}

    def node_address(self, name: str) -> str:
        return network.address(self.names.index(name)) if self.isolated else self.host

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a node that is not up; return its first process."""
        if self.processes(name):
            raise UserError(f"node '{name}' is up already.")
        folder = home() / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += ["--disable-usage-stats", f"--node-ip-address={self.node_address(name)}"]
        command += [
            f"--num-cpus={self._cpus_of(name)}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]
        if name == HEAD:
            self.forget_head()
            command += ["--head", f"--port={self.port}", "--include-dashboard=true"]
            command += [f"--dashboard-port={self.dashboard_port}"]
            command += [f"--system-config={json.dumps(connect.LEAN_RAYLET)}"]
        else:
            # The machine's GPUs are the head's, lest every node offers them.
            command += [f"--address={self.address}", "--num-gpus=0"]
        if self.isolated and name != HEAD:
            network.leave(name)
            network.join(name, self.node_address(name))
            command = network.enter(name, process.own_files(folder, command))
        with (folder / "log").open("wb") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **self._node_environment(name)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """End a node as a power cut would."""
        self.killed += [node["node_id"] for node in self._listed() if name in _resources(node)]
        _keep(self)
        self.end(name)

    def end(self, name: str) -> None:
        """Kill a node's processes."""
        deadline = time.monotonic() + STOP_S
        while pids := self.processes(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise Failed(f"processes {pids} of node '{name}' do not end.")
            time.sleep(0.05)

    def cut(self, name: str) -> None:
        """Unplug a node's network."""
        self._pluggable(name)
        network.cut(name)

    def heal(self, name: str) -> None:
        """Plug a node's network in again."""
        self._pluggable(name)
        network.heal(name)

    def processes(self, name: str | None = None) -> list[int]:
        """Ids of a node's processes, or of all."""
        mark = f"{MARK}={self.id}/{name or ''}"
        return [
            pid
            for pid, environ in process.environments()
            if any(word == mark or (name is None and word.startswith(mark)) for word in environ)
        ]

    def alive(self) -> list[str]:
        """Names of the nodes that Ray takes for alive; none where the head does not answer."""
        alive = [node for node in self._listed() if node["node_id"] not in self.killed]
        return [name for name in self.names if any(name in _resources(node) for node in alive)]

    def stale(self) -> bool:
        """Whether Ray takes a node that was killed for alive still."""
        return any(node["node_id"] in self.killed for node in self._listed())

    def _listed(self) -> list[dict[str, Any]]:
        """Nodes that Ray takes for alive, in its own words."""
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes")
        if token := auth.token():
            request.add_header("Authorization", f"Bearer {token}")
        # Not by way of a proxy that the environment names.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=10) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, TypeError, KeyError, http.client.HTTPException):
            return []  # the head starts, or ends
        return [node for node in nodes if node["state"] == "ALIVE"]

    def forget_head(self) -> None:
        """Ray takes a head for running that is in its notes while nodes of it run here."""
        notes = Path("/tmp/ray/ray_current_cluster")
        if notes.exists() and notes.read_text().strip() == self.address:
            notes.unlink()

    def _pluggable(self, name: str) -> None:
        if not self.isolated:
            raise UserError("the nodes share this machine's network; there is nothing to cut.")
        if name == HEAD:
            raise UserError("the head is on this machine's own network; cut another node.")

    def _node_environment(self, name: str) -> dict[str, str]:
        ingress.prepare()
        shared = {
            **{key: os.environ[key] for key in ingress.names()},
            auth.MODE: self.auth_mode,
            # A command that had a Ray of its own may have set this one.
            connect.ON_LOOPBACK: "1",
            # So that a node is known by the name that it has here.
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": self._cpus_of(name), name: 1}),
            MARK: f"{self.id}/{name}",
        }
        of_head = self.head_environment if name == HEAD else {}
        return {**shared, **self.environment, **of_head}

    def _cpus_of(self, name: str) -> int:
        return self.head_cpus if name == HEAD else self.cpus


def _resources(node: Mapping[str, Any]) -> dict[str, float]:
    resources: dict[str, float] = node["resources_total"]
    return resources


def home() -> Path:
    """Where the nodes' logs and the file of what is up are."""
    return Path(tempfile.gettempdir()) / f"halyard-cluster-{os.getuid()}"


def up(
    num: int,
    cpus: int,
    *,
    port: int = 6379,
    dashboard_port: int = 8265,
    isolate: bool = True,
    head_cpus: int | None = None,
    environment: Mapping[str, str] | None = None,
    head_environment: Mapping[str, str] | None = None,
) -> Cluster:
    """Start `num` nodes, each of `cpus` cores, and return when Ray knows all of them.

    head_cpus: of the head, where it differs. environment: of all nodes besides this process's;
    head_environment: of the head alone.
    Raises UserError where a cluster is up or a port is taken, Failed where a node does not start.
    """
    if not Path("/proc/self/environ").exists():
        raise UserError(
            "several nodes on one machine need Linux; here, commands start a local Ray."
        )
    if (running := current()) is not None:
        raise UserError(
            f"a cluster of {len(running.names)} nodes is up at {running.address}; "
            "python -m cluster down stops it."
        )
    from ray.util import get_node_ip_address

    ingress.prepare()
    problem = network.problem() if isolate else "not asked for"
    # Ray takes the loopback address of several nodes for the machine's own.
    host = get_node_ip_address() if problem else network.address(0)
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
    )
    for each in (port, dashboard_port):
        _check_port(each)
    if problem and isolate:
        print(
            f"no networks of their own for the nodes ({problem}); they share this machine's.",
            file=sys.stderr,
        )
    if not auth.enabled():
        print(
            f"whoever reaches {host} can run code there, as {auth.MODE} is "
            f"{os.environ[auth.MODE]}; unset it to ask for a token.",
            file=sys.stderr,
        )
    down()
    shutil.rmtree(home(), ignore_errors=True)
    home().mkdir(mode=0o700)
    if cluster.isolated:
        network.create()
    _keep(cluster)
    try:
        for together in ([HEAD], names[1:]):
            wait_for({name: cluster.start(name) for name in together}, cluster)
    except BaseException:
        down()
        raise
    return cluster


def down() -> int:
    """Stop what is up, and clear away what is left; return how many nodes were up."""
    cluster = _noted()
    if cluster is None:
        return 0
    was_up = bool(cluster.processes())
    for name in reversed(cluster.names):
        cluster.end(name)
        if cluster.isolated:
            network.leave(name)
    if cluster.isolated:
        network.remove()
    cluster.forget_head()
    shutil.rmtree(home(), ignore_errors=True)
    return len(cluster.names) if was_up else 0


def current() -> Cluster | None:
    """What is up, or None. What is left of one whose processes have ended is not."""
    cluster = _noted()
    return cluster if cluster is not None and cluster.processes() else None


def _noted() -> Cluster | None:
    """What was started last and not stopped. Raises UserError if the note may be another's."""
    place = home()
    try:
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError:
        raise UserError(f"'{place}' is not a folder of this user; remove it.") from None
    try:
        # The note is read from the folder that was looked at, whatever has its name by now.
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
    """Yield a cluster that stops when the block ends. For the options see `up`."""
    cluster = up(num, cpus, **options)
    try:
        yield cluster
    finally:
        down()


def wait_for(started: Mapping[str, subprocess.Popen[bytes]], cluster: Cluster) -> None:
    """Wait until Ray knows the nodes, and that those killed before them are gone.

    started: their first processes. Raises Failed, with the end of a node's log.
    """
    deadline = time.monotonic() + connect.START_S
    while missing := [name for name in started if name not in cluster.alive()]:
        ended = [name for name in missing if started[name].poll() is not None]
        if ended or time.monotonic() > deadline:
            name = (ended or missing)[0]
            log = (home() / name / "log").read_text(errors="replace").strip().splitlines()
            raise Failed(f"node '{name}' does not start: {' '.join(log[-3:])[-400:]}")
        time.sleep(0.1)
    while cluster.stale():
        if time.monotonic() > deadline:
            raise Failed("Ray takes a node that was killed for alive; ray status shows which.")
        time.sleep(0.1)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise UserError(
                f"port {port} is taken by another program; stop that one first "
                f"(ss -ltnp 'sport = :{port}' names it), or give another port."
            ) from None


def _keep(cluster: Cluster) -> None:
    part = home() / "cluster.json.part"
    part.write_text(json.dumps(asdict(cluster)))
    part.replace(home() / "cluster.json")
