"""Ask every node of the cluster the same question."""

from collections.abc import Callable, Sequence
from typing import Any

from cluster import probe

NO_ANSWER = "does not answer"


Node = dict[str, Any]


def alive() -> list[Node]:
    """The nodes that Ray takes for alive, in its words."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def each_node(
    nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any, timeout_s: float
) -> dict[str, tuple[Any, str]]:
    """Call a function of `probe` on nodes: by address, (its answer, "") or (None, why not).

    Nodes that share an address are told apart by the first digits of Ray's id.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # By value, as a node may not have this project.
    ray.cloudpickle.register_pickle_by_value(probe)
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
        ray.cloudpickle.unregister_pickle_by_value(probe)
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


def unreachable(folder: str, file: str, *, timeout_s: float = 30) -> dict[str, str]:
    """Say which nodes cannot read a file that was written here, or write beside it, and why.

    folder: a path or URL. A node that does not answer is left out.
    """
    answers = each_node(alive(), probe.storage_problem, folder, file, timeout_s=timeout_s)
    return {address: problem for address, (problem, _) in answers.items() if problem}
