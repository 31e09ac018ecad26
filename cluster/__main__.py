"""python -m cluster doctor | up | status | down | kill | start | cut | heal"""

import sys
from collections.abc import Container, Sequence
from typing import Any

from pydantic import AliasChoices, BaseModel, Field
from pydantic_settings import CliPositionalArg, CliSubCommand, SettingsConfigDict

from cluster import connect, doctor, storage
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import CommandFailed, UserError
from cluster.local import lifecycle, network_namespace
from cluster.local.cluster import HEAD, Cluster


class DoctorOptions(BaseModel):
    """Check this machine and its cluster, and show how to fix each problem."""

    storage: str = Field(
        storage.DEFAULT_PATH,
        validation_alias=AliasChoices("storage", "storage.path"),
        description="Storage path to check.",
    )


class UpOptions(BaseModel):
    """Start a cluster of several nodes on this machine."""

    nodes: int = Field(3, ge=1, le=100, description="Number of nodes, including the head.")
    cpus: int = Field(2, ge=1, le=100, description="CPUs that each node offers to Ray.")
    head_cpus: int | None = Field(
        None,
        ge=0,
        le=100,
        description="CPUs that the head offers to Ray; 0 keeps work off the head. Default: as "
        "many as the other nodes.",
    )
    port: int = Field(6379, ge=1, le=65535, description="Port of the head, for RAY_ADDRESS.")
    dashboard_port: int = Field(
        8265, ge=1, le=65535, description="Port of the dashboard, which also accepts jobs."
    )
    tls: bool = Field(False, description="Use TLS, with client certificates, between the nodes.")
    shared_network: bool = Field(
        False,
        description="Run all nodes in this machine's network instead of a network namespace each.",
    )


class NoOptions(BaseModel):
    pass


class NodeOptions(BaseModel):
    node: CliPositionalArg[str] = Field(description="Name of the node, as shown by status.")


class ClusterOptions(CommandOptions):
    """Check a cluster, or run a cluster of several nodes on this machine."""

    model_config = SettingsConfigDict(cli_prog_name="python -m cluster")

    doctor: CliSubCommand[DoctorOptions] = Field(
        description="Check this machine and its cluster, and show how to fix each problem."
    )
    up: CliSubCommand[UpOptions] = Field(
        description="Start a cluster of several nodes on this machine."
    )
    status: CliSubCommand[NoOptions] = Field(description="Show the nodes and their states.")
    down: CliSubCommand[NoOptions] = Field(description="Stop the cluster.")
    kill: CliSubCommand[NodeOptions] = Field(
        description="Stop a node abruptly, as a power failure would."
    )
    start: CliSubCommand[NodeOptions] = Field(description="Start a node that was killed.")
    cut: CliSubCommand[NodeOptions] = Field(description="Disconnect a node from the network.")
    heal: CliSubCommand[NodeOptions] = Field(description="Reconnect a node to the network.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the subcommand in `argv`; return its result. Raises UserError if there is none."""
    options = parse_options(ClusterOptions, argv)
    connect.set_ray_environment()
    for name, given in options:
        match name, given:
            case _, None:
                continue
            case "doctor", DoctorOptions():
                return _doctor(given)
            case "up", UpOptions():
                return _up(given)
            case "status", _:
                return _status()
            case "down", _:
                return _down()
            case _, NodeOptions():
                return _change(name, given.node)
    raise UserError(
        f"no subcommand is given; expected one of {', '.join(ClusterOptions.model_fields)}."
    )


def _doctor(options: DoctorOptions) -> dict[str, Any]:
    if not doctor.show_findings(doctor.examine(options.storage)):
        raise CommandFailed("a required part is missing; the table says how to fix it.")
    return {"healthy": True}


def _up(options: UpOptions) -> dict[str, Any]:
    cluster = lifecycle.up(
        options.nodes,
        options.cpus,
        port=options.port,
        dashboard_port=options.dashboard_port,
        head_cpus=options.head_cpus,
        isolate=not options.shared_network,
        tls=options.tls,
    )
    print("To use this cluster, run in your shell:", file=sys.stderr)
    for name, value in cluster.client_environment.items():
        print(f"  export {name}={value}", file=sys.stderr)
    return _described(cluster)


def _status() -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    cluster = _current()
    alive = cluster.alive()
    states: dict[str, dict[str, Any]] = {
        name: {
            "address": cluster.node_address(name),
            "state": _state(cluster, name, alive),
            "cut": cluster.isolated and name != HEAD and network_namespace.is_cut(name),
        }
        for name in cluster.names
    }
    table = Table("node", "address", "state", "network")
    for name, state in states.items():
        words = "cut" if state["cut"] else "own" if cluster.isolated else "shared"
        table.add_row(name, state["address"], state["state"], words)
    Console(stderr=True).print(table)
    return {**_described(cluster), "nodes": states}


def _state(cluster: Cluster, name: str, alive: Container[str]) -> str:
    if not cluster.processes(name):
        return "off"
    return "alive" if name in alive else "lost"


def _down() -> dict[str, Any]:
    stopped = lifecycle.down()
    if not stopped:
        print("no cluster is up; nothing was stopped.", file=sys.stderr)
    return {"stopped": stopped}


def _change(action: str, node: str) -> dict[str, Any]:
    """Call the method of the cluster that `action` names: kill, start, cut or heal."""
    cluster = _current()
    if node not in cluster.names:
        raise UserError(f"unknown node '{node}'; expected one of {', '.join(cluster.names)}.")
    started = getattr(cluster, action)(node)
    if action == "start":
        lifecycle.wait_for({node: started}, cluster)
    return {"node": node, "done": action}


def _current() -> Cluster:
    cluster = lifecycle.current()
    if cluster is None:
        raise UserError("no cluster is up; python -m cluster up starts one.")
    return cluster


def _described(cluster: Cluster) -> dict[str, Any]:
    return {
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "isolated": cluster.isolated,
        "nodes": cluster.names,
        "environment": cluster.client_environment,
    }


if __name__ == "__main__":
    run_command(main)
