"""A Ray cluster of several nodes on this machine, for tests and experiments.

The nodes are real raylets, each with its own agents, object store and, if permissions allow it, its
own network and temporary files, as if on separate machines. The head is in this machine's network,
so that commands can join the cluster like any other. The state of the cluster is stored in a file,
so that one command can start it and another one stop it.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster import auth, connect, ray_internals, serve_environment
from cluster.errors import CommandFailed, UserError
from cluster.local import network_namespace
from cluster.local.node_certificates import tls_environment
from cluster.local.processes import process_environments, with_private_tmp

HEAD = "head"

LOOPBACK = "127.0.0.1"

# Names the cluster and the node in the environment of every process of a node.
MARK = "HALYARD_NODE"

OBJECT_STORE_BYTES = 256 * 2**20

STOP_S = 15


@dataclass
class Cluster:
    """A local cluster and its options. Stored in a file after each change."""

    id: str
    host: str
    cpus: int
    port: int
    dashboard_port: int
    isolated: bool
    names: list[str]
    head_cpus: int
    # Ray's authentication mode in the nodes.
    auth_mode: str = "token"
    # Variables added to the environment of all nodes, and of the head only.
    environment: dict[str, str] = field(default_factory=dict)
    head_environment: dict[str, str] = field(default_factory=dict)
    # Whether the nodes use TLS between each other.
    tls: bool = False
    # Ray's ids of killed nodes, which Ray lists as alive for some seconds more.
    killed: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The value for RAY_ADDRESS."""
        return f"{self.host}:{self.port}"

    @property
    def dashboard(self) -> str:
        """The URL of the dashboard, for `ray job submit --address`."""
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """The environment variables that a command needs to use this cluster."""
        token = {auth.PATH: os.environ[auth.PATH]} if auth.PATH in os.environ else {}
        return {
            "RAY_ADDRESS": self.address,
            auth.MODE: self.auth_mode,
            **token,
            **self._tls_environment(HEAD),
        }

    def _tls_environment(self, name: str) -> dict[str, str]:
        return tls_environment(certificates_home(), name) if self.tls else {}

    def node_address(self, name: str) -> str:
        """Return a node's IP address."""
        return (
            network_namespace.node_address(self.names.index(name)) if self.isolated else self.host
        )

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a node; return its first process. Raises UserError if the node is running."""
        if self.processes(name):
            raise UserError(f"node '{name}' is already running.")
        folder = cluster_home() / name
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
            # Only the head offers the machine's GPUs, which every node would offer otherwise.
            command += [f"--address={self.address}", "--num-gpus=0"]
        if self.isolated and name != HEAD:
            network_namespace.disconnect_node(name)
            network_namespace.connect_node(name, self.node_address(name))
            command = network_namespace.enter_command(name, with_private_tmp(folder, command))
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
        """Stop a node abruptly, as a power failure would."""
        self.killed += [node["node_id"] for node in self._listed() if name in _resources(node)]
        write_note(self)
        self.end(name)

    def end(self, name: str) -> None:
        """Kill a node's processes. Raises CommandFailed if they do not end in STOP_S seconds."""
        deadline = time.monotonic() + STOP_S
        while pids := self.processes(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise CommandFailed(f"processes {pids} of node '{name}' did not end when killed.")
            time.sleep(0.05)

    def cut(self, name: str) -> None:
        """Disconnect a node from the network."""
        self._pluggable(name)
        network_namespace.cut_node(name)

    def heal(self, name: str) -> None:
        """Reconnect a node to the network."""
        self._pluggable(name)
        network_namespace.heal_node(name)

    def processes(self, name: str | None = None) -> list[int]:
        """Return the ids of the processes of a node, or of all nodes."""
        mark = f"{MARK}={self.id}/{name or ''}"
        return [
            pid
            for pid, environ in process_environments()
            if any(word == mark or (name is None and word.startswith(mark)) for word in environ)
        ]

    def alive(self) -> list[str]:
        """Return the names of the nodes that are alive; none if the head does not respond."""
        alive = [node for node in self._listed() if node["node_id"] not in self.killed]
        return [name for name in self.names if any(name in _resources(node) for node in alive)]

    def stale(self) -> bool:
        """Return whether Ray still lists a killed node as alive."""
        return any(node["node_id"] in self.killed for node in self._listed())

    def _listed(self) -> list[dict[str, Any]]:
        """Return Ray's own records of the nodes that it lists as alive."""
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes")
        if token := auth.token():
            request.add_header("Authorization", f"Bearer {token}")
        # Ignore a proxy that the environment names.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=10) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, TypeError, KeyError, http.client.HTTPException):
            return []  # the head is starting or stopping
        return [node for node in nodes if node["state"] == "ALIVE"]

    def forget_head(self) -> None:
        """Delete Ray's address file if it names this head.

        While other nodes of this cluster run here, Ray would consider that head as running.
        """
        notes = ray_internals.address_file()
        if notes.exists() and notes.read_text().strip() == self.address:
            notes.unlink()

    def _pluggable(self, name: str) -> None:
        """Raise UserError if a node's network cannot be cut."""
        if not self.isolated:
            raise UserError("the nodes share this machine's network; there is nothing to cut.")
        if name == HEAD:
            raise UserError("the head is on this machine's own network; cut another node.")

    def _node_environment(self, name: str) -> dict[str, str]:
        serve_environment.prepare_local_serving()
        shared = {
            **{key: os.environ[key] for key in serve_environment.variable_names()},
            auth.MODE: self.auth_mode,
            # This process has set it to 0 if it started a local Ray earlier.
            connect.ON_LOOPBACK: "1",
            # The resource with the node's name identifies the node in Ray's records.
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": self._cpus_of(name), name: 1}),
            MARK: f"{self.id}/{name}",
            **self._tls_environment(name),
        }
        of_head = self.head_environment if name == HEAD else {}
        return {**shared, **self.environment, **of_head}

    def _cpus_of(self, name: str) -> int:
        return self.head_cpus if name == HEAD else self.cpus


def _resources(node: Mapping[str, Any]) -> dict[str, float]:
    resources: dict[str, float] = node["resources_total"]
    return resources


def cluster_home() -> Path:
    """Return the folder of the cluster's state and of the nodes' logs."""
    return Path(tempfile.gettempdir()) / f"halyard-cluster-{os.getuid()}"


def certificates_home() -> Path:
    """Return the folder of the nodes' certificates."""
    return cluster_home() / "certificates"


def write_note(cluster: Cluster) -> None:
    """Store the state of a cluster in its file."""
    part = cluster_home() / "cluster.json.part"
    part.write_text(json.dumps(asdict(cluster)))
    part.replace(cluster_home() / "cluster.json")
