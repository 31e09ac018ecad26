"""Run a function on every node of the cluster."""

from collections.abc import Callable, Sequence
from typing import Any

from cluster.ingress import haproxy_config
from cluster.nodes import node_checks

NO_ANSWER = "did not respond"
# Modules that are sent to the nodes, which may not have this project installed.
SENT = (node_checks, haproxy_config)

Node = dict[str, Any]


def alive_nodes() -> list[Node]:
    """Return Ray's own records of the nodes that it lists as alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def run_on_each(
    nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any, timeout_s: float
) -> dict[str, tuple[Any, str]]:
    """Call a function of `node_checks` on each node; return the results by address.

    A result is (returned value, "") or (None, the reason why there is none). Nodes that share an
    address are distinguished by the first digits of their ids in Ray.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for module in SENT:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        asked = {
            _name(node, nodes): ray.remote(question)
            .options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(*arguments)
            for node in nodes
        }
    finally:
        for module in SENT:
            ray.cloudpickle.unregister_pickle_by_value(module)
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    answers: dict[str, tuple[Any, str]] = {}
    for address, reference in asked.items():
        if reference not in done:
            ray.cancel(reference, force=True)
            answers[address] = None, f"{NO_ANSWER} within {timeout_s:g} s"
            continue
        try:
            answers[address] = ray.get(reference), ""
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            answers[address] = None, lines[-1]
    return answers


def _name(node: Node, nodes: Sequence[Node]) -> str:
    address: str = node["NodeManagerAddress"]
    shared = sum(each["NodeManagerAddress"] == address for each in nodes) > 1
    return f"{address} ({node['NodeID'][:6]})" if shared else address


def nodes_without_storage(folder: str, file: str, *, timeout_s: float = 30) -> dict[str, str]:
    """Return the nodes that cannot read a file written here or write next to it, with the reasons.

    folder: a path or URL. A node that does not respond is left out.
    """
    answers = run_on_each(
        alive_nodes(), node_checks.storage_problem, folder, file, timeout_s=timeout_s
    )
    return {address: problem for address, (problem, _) in answers.items() if problem}
