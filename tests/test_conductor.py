"""The conductor: feedback that comes before its request is known, and a disk that is not there."""

import asyncio
import json

import pytest

from serve.audit import AuditLog
from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound
from serve.monitor.conductor import Conductor
from serve.monitor.overseer import Report
from serve.served import State


class Replicas:
    """A repository whose replicas report in turn what a test has given it."""

    def __init__(self, bundle, reports):
        self.current = State(0, "digits", "3", {"3": str(bundle.path)})
        self.loading = asyncio.Lock()
        self.reports, self.conductor, self.heard = list(reports), None, 0

    async def hear(self):
        self.heard += 1
        await asyncio.sleep(0)
        if self.reports:
            self.conductor.report(self.reports.pop(0))


async def made(bundle, root, *reports, **options):
    """A conductor whose model is watched, and its replicas."""
    replicas = Replicas(bundle, reports)
    options = {"log_share": 1, "monitor_rows_per_s": 0, "storage": str(root), **options}
    replicas.conductor = conductor = Conductor(
        replicas, ServeConfig(**options), "digits", AuditLog(str(root), "digits")
    )
    await conductor._tick()
    return conductor, replicas


def answered(request_id, *labels):
    return Report(answered=[(request_id, "3", list(labels))])


@pytest.mark.parametrize("before", [0, 1])
def test_feedback_waits_for_what_the_replicas_report(bundle, tmp_path, before):
    async def scenario():
        reports = [Report()] * before + [answered("a", "1", "2")]
        conductor, replicas = await made(bundle, tmp_path, *reports)
        # One that was heard before counts for no later request.
        conductor._hearing = asyncio.get_running_loop().create_future()
        conductor._hearing.set_result(None)
        given = await conductor.feedback("a", [1, "3"])
        assert given == {"id": "a", "counted": True, "changed": True}
        assert replicas.heard == before + 1
        live = conductor.stats()["monitor"]["3"]["feedback"]
        assert (live["count"], live["value"]) == (2, 0.5)
        assert (
            live["expected"]
            == bundle.manifest.variants[bundle.manifest.default_variant].metrics["test_accuracy"]
        )
        await conductor.close()

    asyncio.run(scenario())


def test_many_who_wait_are_heard_together(bundle, tmp_path):
    async def scenario():
        reports = [Report(answered=[(f"r{n}", "3", ["1"]) for n in range(50)])]
        conductor, replicas = await made(bundle, tmp_path, *reports)
        await asyncio.gather(*(conductor.feedback(f"r{n}", ["1"]) for n in range(50)))
        assert replicas.heard == 1
        await conductor.close()

    asyncio.run(scenario())


def test_what_nobody_answered_and_what_is_not_sampled_is_said(bundle, tmp_path):
    async def scenario():
        conductor, _ = await made(bundle, tmp_path)
        with pytest.raises(NotFound, match="no request 'never' is known"):
            await conductor.feedback("never", ["1"])
        few, _ = await made(bundle, tmp_path, log_share=1e-9)
        assert (await few.feedback("never", ["1"]))["counted"] is False
        none, _ = await made(bundle, tmp_path, log_share=0)
        with pytest.raises(BadRequest, match="log_share"):
            await none.feedback("never", ["1"])

    asyncio.run(scenario())


def test_a_state_that_cannot_be_written_is_told_once_and_written_later(bundle, tmp_path, caplog):
    async def scenario():
        conductor, _ = await made(bundle, tmp_path, answered("a", "1"))
        blocking = tmp_path / "monitor"
        blocking.write_text("no folder")
        await conductor.feedback("a", ["1"])
        for _ in range(3):
            await conductor._tick()
        assert caplog.text.count("cannot be written") == 1
        blocking.unlink()
        await conductor._tick()
        state = json.loads((blocking / "digits.json").read_text())
        assert state["versions"]["3"]["feedback"]["value"] == 1
        assert state["production"] == "3"
        await conductor.close()

    asyncio.run(scenario())


def test_a_version_that_is_not_served_any_more_is_not_told_of(bundle, tmp_path):
    async def scenario():
        conductor, replicas = await made(bundle, tmp_path, answered("a", "1"))
        await conductor.feedback("a", ["1"])
        assert "live_accuracy" in conductor.overseer.snapshot()
        replicas.current = State(1, "digits", "4", {"4": str(bundle.path)})
        await conductor._tick()
        assert list(conductor.stats()["monitor"]) == ["4"]
        assert conductor.overseer.snapshot() == {}
        await conductor.close()

    asyncio.run(scenario())
