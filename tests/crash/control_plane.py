"""python -m tests.crash.control_plane BUNDLE FOLDER [SCENARIO …]: faults at each transition.

Uses a real registry and a real repository with a simulated replica. Each scenario runs once to
count its transitions, then once per transition in a process that is killed there or in which that
step fails. Another process of the same deployment then continues. At the end, the registry and the
served version must be the same as in the run without a fault, with one decision in the registry
and one in the audit log.
"""

import asyncio
import json
import os
import pickle
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.access import Actor
from serve.config import RolloutOptions, ServeConfig
from serve.control import reconciler, state_publisher
from serve.control.desired_state import Transition
from serve.control.repository import Repository
from serve.errors import RequestError
from serve.rollout.aggregator import ReplicaReport
from serve.rollout.verdict import ArmComparison
from serve.state import ServingState
from tests.registry_faults import publish
from train.bundle import Bundle, registry

ENDED = 77
ROUNDS = 60
ACTOR = Actor("team", "127.0.0.1", "r1")
# The version that is served at the end of each scenario: 1 was deployed first, 2 is the other.
PROMOTED, ROLLED_BACK, LOADED, FOLLOWED = "promoted", "rolled back", "loaded", "followed"
SCENARIOS = {PROMOTED: "2", ROLLED_BACK: "1", LOADED: "2", FOLLOWED: "2"}
MODES = ("killed", "failed")


def prepare(bundle: Bundle, folder: Path) -> ServingState:
    """Register two versions, the first in production; return the state of its deployment."""
    publish(bundle, str(folder), 0.5)
    publish(bundle, str(folder), 0.6, candidate="to be tried")
    return reconciler.resolve_serving_state(_config(PROMOTED, folder))


def inject(folder: Path, deployed: ServingState, scenario: str) -> dict[str, Any]:
    """Return the transitions that were seen, and the number of fault points by outcome."""
    seen, _, expected = _run(folder, deployed, scenario, 0, "")
    assert expected is not None
    assert expected["default"] == SCENARIOS[scenario]
    outcomes: Counter[str] = Counter()
    for mode in MODES:
        for number in range(1, len(seen) + 1):
            _, ended, found = _run(folder, deployed, scenario, number, mode)
            assert ended == (ENDED if mode == "killed" else 0), f"{mode} at {number}: {ended}"
            where = f"{scenario}: {mode} after '{seen[number - 1]}'"
            outcomes["points"] += 1
            outcomes["as without a fault" if found == expected else f"{where}: {found}"] += 1
    return {"transitions": seen, "outcomes": dict(outcomes), "expected": expected}


def _config(scenario: str, root: Path) -> ServeConfig:
    rollouts = scenario in (PROMOTED, ROLLED_BACK)
    return ServeConfig(
        model="models:/digits@production",
        storage=str(root),
        shadow=0.5 if rollouts else 0,
        canary=0.5 if rollouts else 0,
        log={"sample_rate": 1},
        drift={"rows_per_s": 0},
        rollout=RolloutOptions(min_labels=10, noninferiority_margin=1),
    )


def _run(
    template: Path, deployed: ServingState, scenario: str, number: int, mode: str
) -> tuple[list[str], int, dict[str, Any] | None]:
    """Run a scenario with a fault after transition `number`, then continue without faults.

    Return the transitions, the exit code of the first process, and the final state.
    """
    root = template.with_name(f"{template.name}-run")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    shutil.copyfile(template / "mlflow.db", root / "mlflow.db")
    seen, ended, found = _child(lambda: _scenario(root, deployed, scenario, number, mode))
    if mode == "killed":
        _, ended_again, found = _child(lambda: _scenario(root, deployed, scenario, 0, ""))
        assert ended_again == 0, "the process that goes on failed"
    return seen, ended, found


def _child(run: Callable[[], tuple[list[str], Any]]) -> tuple[list[str], int, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, pickle.dumps(run()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen, found = pickle.loads(content) if content else ([], None)
    return seen, status, found


def _scenario(
    root: Path, deployed: ServingState, scenario: str, number: int, mode: str
) -> tuple[list[str], dict[str, Any]]:
    state_publisher.POLL_S = 0.05
    reconciler.FOLLOW_S = reconciler.RETRY_S = 0.0
    seen: list[str] = []

    def reached(transition: Transition) -> None:
        seen.append(transition.name)
        if len(seen) == number and mode == "killed":
            os._exit(ENDED)
        if len(seen) == number and mode == "failed":
            raise OSError("injected")

    return seen, asyncio.run(_reconcile(root, deployed, scenario, reached))


async def _reconcile(
    root: Path, deployed: ServingState, scenario: str, reached: Callable[[Transition], None]
) -> dict[str, Any]:
    name = deployed.name
    repository = Repository(_config(scenario, root), deployed, reached=reached)
    await repository._rollouts.load_decisions()
    replica = Replica(deployed)
    following = asyncio.create_task(replica.follow(repository))
    client = registry.mlflow_client(str(root))
    if scenario in (LOADED, FOLLOWED):
        client.set_registered_model_alias(name, "production", "2")
    for number in range(ROUNDS):
        with suppress(OSError, RequestError):
            if scenario == LOADED:
                await repository.load(name, ACTOR)
            await repository._tick()
            await _observe(repository, scenario, number)
        state = repository.current
        decided = scenario in (LOADED, FOLLOWED) or registry.list_decisions(str(root), name)
        done = state.default == SCENARIOS[scenario] and state.rollout is None and decided
        if done and repository._publisher.decision is None and replica.state == state:
            break
    following.cancel()
    audit = Path(root, "audit", f"{name}.jsonl")
    lines = [json.loads(line) for line in audit.read_text().splitlines()] if audit.exists() else []
    aliases = client.get_registered_model(name).aliases
    return {
        "default": state.default,
        "served": replica.state.default,
        "rollout": state.rollout,
        "decisions": [each["decision"] for each in registry.list_decisions(str(root), name)],
        "told": [each["decision"] for each in (await repository.stats())["decisions"]],
        "audited": [line["action"] for line in lines if line["client"] == "rollout"],
        "aliases": {alias: str(version) for alias, version in aliases.items()},
    }


class Replica:
    """A simulated replica that adopts each state of the repository immediately."""

    def __init__(self, deployed: ServingState) -> None:
        self.state = deployed

    async def follow(self, repository: Repository) -> None:
        while True:
            state = await repository.follow("replica", self.state.id, None, {})
            self.state = state or self.state


async def _observe(repository: Repository, scenario: str, number: int) -> None:
    """Report results of the candidate: the same predictions as production, or failures."""
    rollout = repository.current.rollout
    if rollout is None:
        return
    comparison = ArmComparison(rollout.candidate)
    predictions = [
        (f"{number}-{each}", version, ["1"])
        for each in range(40)
        for version in (repository.current.default, rollout.candidate)
    ]
    if scenario == ROLLED_BACK:
        for _ in range(10):
            comparison.arms["candidate"].failed()
    await repository.collect(ReplicaReport(predictions=predictions, comparison=comparison))
    for each in range(40):
        await repository.feedback(repository.current.name, f"{number}-{each}", ["1"], ACTOR)


def main(location: str, folder: Path, scenarios: Sequence[str]) -> dict[str, Any]:
    # Create the registry's tables once, in a child process, so that no connections are forked.
    bundle = Bundle.load(location)
    template = folder / "template"
    template.mkdir()
    _, ended, deployed = _child(lambda: ([], prepare(bundle, template)))
    assert ended == 0
    deployed = replace(deployed, incarnation="deployment")
    import mlflow  # noqa: F401 - imported once, for all child processes

    found = {scenario: inject(template, deployed, scenario) for scenario in scenarios}
    seen = {name for each in found.values() for name in each["transitions"]}
    return {"scenarios": found, "transitions never seen": sorted({*Transition.__members__} - seen)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or [*SCENARIOS]), indent=1))
