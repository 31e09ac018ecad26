"""Wherever the control plane crashes, it reaches the desired state and decides nothing twice."""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from serve.control.desired_state import Conflict, DesiredState, DesiredStateStore
from serve.control.state_publisher import StatePublisher
from serve.rollout.verdict import RolloutDecision
from serve.state import Rollout, ServingState
from tests.crash.control_plane import FOLLOWED, PROMOTED
from tests.server import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_control_plane_recovers_after_any_transition(bundle, tmp_path):
    scenarios = (PROMOTED, FOLLOWED)  # a manual run takes all scenarios
    given = str(bundle.path), str(tmp_path), *scenarios
    result = subprocess.run(
        [sys.executable, "-m", "tests.crash.control_plane", *given],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["transitions never seen"] == []
    for scenario in scenarios:
        outcomes = found["scenarios"][scenario]["outcomes"]
        assert outcomes == {"points": outcomes["points"], "as without a fault": outcomes["points"]}
        assert outcomes["points"] == 2 * len(found["scenarios"][scenario]["transitions"])


STATE = ServingState(
    3,
    "digits",
    "1",
    {"1": "/one", "2": "/two"},
    {"production": "1"},
    rollout=Rollout("2", "shadow", 0.5),
    incarnation="deployment",
)
DECISION = RolloutDecision("2026-01-01T00:00:00+00:00", "2", "1", "promoted", "better", {"n": 1})


def test_a_written_state_is_read_back(tmp_path):
    store = DesiredStateStore(str(tmp_path), STATE)
    assert store.read() == DesiredState(0, STATE)
    written = store.write(DesiredState(0, STATE, STATE, DECISION))
    assert DesiredStateStore(str(tmp_path), STATE).read() == written
    assert written.state.incarnation == "deployment"
    for _ in range(20):
        written = store.write(written)
    assert (written.number, store.read()) == (21, written)
    assert len(list((tmp_path / "serving/digits/deployment").iterdir())) == 10


@pytest.mark.parametrize("root", ["{}", "memory://{}"])
def test_one_of_two_concurrent_writers_succeeds(tmp_path, root):
    root = root.format(tmp_path)
    one, other = DesiredStateStore(root, STATE), DesiredStateStore(root, STATE)
    at = one.read()
    one.write(DesiredState(at.number, STATE))
    with pytest.raises(Conflict, match="document 1 "):
        other.write(DesiredState(at.number, STATE, decision=DECISION))
    assert other.read().decision is None


def test_a_process_with_an_outdated_state_writes_nothing(tmp_path):
    """Meanwhile other processes wrote and deleted the document that it would write next."""
    store = DesiredStateStore(str(tmp_path), STATE)
    late = now = store.read()
    for _ in range(15):
        now = store.write(now)
    with pytest.raises(Conflict, match="already at document 15"):
        store.write(late)
    assert store.read() == now


def test_another_deployment_starts_with_its_own_state(tmp_path):
    DesiredStateStore(str(tmp_path), STATE).write(DesiredState(0, STATE))
    new = ServingState(0, "digits", "2", {"2": "/two"}, incarnation="another")
    assert DesiredStateStore(str(tmp_path), new).read() == DesiredState(0, new)


def test_no_change_waits_for_a_replica_that_has_left(tmp_path):
    async def scenario():
        publisher = StatePublisher(DesiredStateStore(str(tmp_path), STATE))
        before = publisher.current

        async def stay():
            known = before.id
            while known == before.id:
                known = (await publisher.follow("stays", known, None, {})).id
            return await publisher.follow("stays", known, None, {})

        staying = asyncio.create_task(stay())
        leaving = asyncio.create_task(publisher.follow("leaves", before.id, None, {}))
        await asyncio.sleep(0)
        assert publisher.living().keys() == {"stays", "leaves"}
        publisher.leave("leaves")
        async with asyncio.timeout(5):
            await publisher.publish(replace(before, default="2"))
        assert publisher.current.default == "2"
        for task in (staying, leaving):
            task.cancel()

    asyncio.run(scenario())
