"""python -m cluster doctor | up | status | down | kill | start | cut | heal"""

import argparse
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any

from cluster import connect, doctor, network, nodes, storage
from cluster.errors import Failed, UserError, run_command


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    arguments = _parser().parse_args(argv)
    connect.prepare_environment()
    result: dict[str, Any] | None = arguments.run(arguments)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("doctor", help="what works here, what is missing, what to do")
    command.add_argument("--storage.path", dest="storage_path", default=storage.DEFAULT_PATH)
    command.set_defaults(run=_doctor)

    command = commands.add_parser("up", help="start a cluster of several nodes on this machine")
    command.add_argument("--nodes", type=_at_least_one, default=3, help="with the head (3)")
    command.add_argument("--cpus", type=_at_least_one, default=2, help="that each offers (2)")
    command.add_argument("--head-cpus", type=_count, help="that the head offers; 0: no work there")
    command.add_argument("--port", type=_port, default=6379, help="of the head (6379)")
    command.add_argument("--dashboard-port", type=_port, default=8265, help="for jobs (8265)")
    command.add_argument(
        "--shared-network", action="store_true", help="no networks of their own for the nodes"
    )
    command.set_defaults(run=_up)

    command = commands.add_parser("status", help="which nodes are up")
    command.set_defaults(run=_status)
    command = commands.add_parser("down", help="stop the cluster")
    command.set_defaults(run=_down)

    for name, words in {
        "kill": "end a node as a power cut would",
        "start": "start a node that was killed",
        "cut": "unplug a node's network",
        "heal": "plug it in again",
    }.items():
        command = commands.add_parser(name, help=words)
        command.add_argument("node", help="a node's name, from status")
        command.set_defaults(run=_change)
    return parser


def _bounded(least: int, most: int) -> Callable[[str], int]:
    def parse(word: str) -> int:
        if not word.isdecimal() or not least <= int(word) <= most:
            raise argparse.ArgumentTypeError(f"'{word}' is not a number from {least} to {most}")
        return int(word)

    return parse


_at_least_one, _count, _port = _bounded(1, 100), _bounded(0, 100), _bounded(1, 65535)


def _doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    if not doctor.report(doctor.examine(arguments.storage_path)):
        raise Failed("something that is needed is missing; the table says what to do.")
    return {"healthy": True}


def _up(arguments: argparse.Namespace) -> dict[str, Any]:
    cluster = nodes.up(
        arguments.nodes,
        arguments.cpus,
        port=arguments.port,
        dashboard_port=arguments.dashboard_port,
        head_cpus=arguments.head_cpus,
        isolate=not arguments.shared_network,
    )
    print("To use it, in this shell:", file=sys.stderr)
    for name, value in cluster.client_environment.items():
        print(f"  export {name}={value}", file=sys.stderr)
    return _described(cluster)


def _status(arguments: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    cluster = _current()
    alive = cluster.alive()
    states: dict[str, dict[str, Any]] = {
        name: {
            "address": cluster.node_address(name),
            "state": _state(cluster, name, alive),
            "cut": cluster.isolated and name != nodes.HEAD and network.is_cut(name),
        }
        for name in cluster.names
    }
    table = Table("node", "address", "state", "network")
    for name, state in states.items():
        words = "cut" if state["cut"] else "its own" if cluster.isolated else "shared"
        table.add_row(name, state["address"], state["state"], words)
    Console(stderr=True).print(table)
    return {**_described(cluster), "nodes": states}


def _state(cluster: nodes.Cluster, name: str, alive: Container[str]) -> str:
    if not cluster.processes(name):
        return "off"
    return "alive" if name in alive else "lost"


def _down(arguments: argparse.Namespace) -> dict[str, Any]:
    stopped = nodes.down()
    if not stopped:
        print("no cluster is up; nothing was stopped.", file=sys.stderr)
    return {"stopped": stopped}


def _change(arguments: argparse.Namespace) -> dict[str, Any]:
    cluster = _current()
    if arguments.node not in cluster.names:
        raise UserError(
            f"there is no node '{arguments.node}'; there are {', '.join(cluster.names)}."
        )
    started = getattr(cluster, arguments.command)(arguments.node)
    if arguments.command == "start":
        nodes.wait_for({arguments.node: started}, cluster)
    return {"node": arguments.node, "done": arguments.command}


def _current() -> nodes.Cluster:
    cluster = nodes.current()
    if cluster is None:
        raise UserError("no cluster is up; python -m cluster up starts one.")
    return cluster


def _described(cluster: nodes.Cluster) -> dict[str, Any]:
    return {
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "isolated": cluster.isolated,
        "nodes": cluster.names,
        "environment": cluster.client_environment,
    }


if __name__ == "__main__":
    run_command(main)
