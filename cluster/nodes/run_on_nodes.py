"""Ask every node of the cluster the same question."""

from collections.abc import Callable, Sequence
from typing import Any

from cluster.ingress import haproxy_config
from cluster.nodes import node_checks

NO_ANSWER = "does not answer"
# Modules that nodes are sent, as they may not have this project.
SENT = (node_checks, haproxy_config)

Node = dict[str, Any]


def alive_nodes() -> list[Node]:
    """The nodes that Ray takes for alive, in its words."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def run_on_each(
    nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any, timeout_s: float
) -> dict[str, tuple[Any, str]]:
    """Call a function of `node_checks`: by address, (its result, "") or (None, why there is none).

    Nodes that share an address are told apart by the first digits of Ray's id.
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
    """Say which nodes cannot read a file that was written here, or write beside it, and why.

    folder: a path or URL. A node that does not answer is left out.
    """
    answers = run_on_each(
        alive_nodes(), node_checks.storage_problem, folder, file, timeout_s=timeout_s
    )
    return {address: problem for address, (problem, _) in answers.items() if problem}
