"""Feedback that arrives before its request's predictions, and the monitor's state."""

import asyncio
import json

import numpy as np
import pytest

from serve.access import Actor
from serve.config import ServeConfig
from serve.control.repository import Repository
from serve.errors import BadRequest, NotFound
from serve.requestlog.schema import LogEntry
from serve.requestlog.writer import RequestLog
from serve.rollout import feedback_receiver
from serve.rollout.aggregator import ReplicaReport
from serve.state import ServingState

CLIENT = Actor("someone", "127.0.0.1", "id")


async def make_repository(bundle, root, *, start=True, **options):
    """Return a repository of the bundle as version 3. start: whether to start monitoring."""
    options = {
        "log": {"sample_rate": 1},
        "drift": {"rows_per_s": 0},
        "storage": str(root),
        **options,
    }
    state = ServingState(0, "digits", "3", {"3": str(bundle.path)})
    repository = Repository(ServeConfig(**options), state)
    if start:
        await repository._tick()
    return repository


def predicted(request_id, *labels):
    return ReplicaReport(predictions=[(request_id, "3", list(labels))])


def test_feedback_waits_for_the_predictions_of_its_request(bundle, tmp_path):
    async def scenario():
        repository = await make_repository(bundle, tmp_path)
        waiting = asyncio.create_task(repository.feedback("digits", "a", [1, "3"], CLIENT))
        for report in (predicted("b", "1"), ReplicaReport()):
            await asyncio.sleep(0)
            await repository.collect(report)
        assert not waiting.done()
        await repository.collect(predicted("a", "1", "2"))
        assert await waiting == {"id": "a", "counted": True, "changed": True}
        live = (await repository.stats())["monitor"]["3"]["feedback"]
        assert (live["count"], live["value"]) == (2, 0.5)
        manifest = bundle.manifest
        expected = manifest.variants[manifest.default_variant].metrics["test_accuracy"]
        assert live["expected"] == expected
        await repository.close()

    asyncio.run(scenario())


def test_predictions_before_monitoring_starts_are_kept(bundle, tmp_path):
    async def scenario():
        repository = await make_repository(bundle, tmp_path, start=False)
        collecting = asyncio.create_task(repository.collect(predicted("a", "1")))
        waiting = asyncio.create_task(repository.feedback("digits", "a", ["1"], CLIENT))
        await asyncio.sleep(0)
        await repository._tick()
        assert (await waiting)["counted"]
        await collecting
        await repository.close()

    asyncio.run(scenario())


def test_feedback_for_old_requests_is_matched_by_the_log(bundle, tmp_path, monkeypatch):
    """It does not wait for predictions, which no replica will send."""

    async def scenario():
        repository = await make_repository(bundle, tmp_path)
        log = RequestLog(str(tmp_path), "digits", repository._config.log)
        predictions = {
            "label": np.array(["4"], object),
            "probabilities": np.eye(10, dtype=np.float32)[4:5],
        }
        log.add(LogEntry("old", "3", "fp32", 1e9, 0.01, {}, predictions, ()))
        await log.close()
        monkeypatch.setattr(feedback_receiver, "ARRIVAL_S", 60)
        async with asyncio.timeout(20):
            response = await repository.feedback("digits", "old", ["4"], CLIENT)
        assert response["counted"]
        assert (await repository.stats())["monitor"]["3"]["feedback"]["value"] == 1
        await repository.close()

    asyncio.run(scenario())


def test_predictions_can_arrive_while_the_log_is_searched(bundle, tmp_path, monkeypatch):
    async def scenario():
        repository = await make_repository(bundle, tmp_path)
        loop = asyncio.get_running_loop()

        def search(*arguments):
            collected = repository.collect(predicted("a", "1"))
            asyncio.run_coroutine_threadsafe(collected, loop).result()
            return

        monkeypatch.setattr(feedback_receiver.reader, "find_request", search)
        assert (await repository.feedback("digits", "a", ["1"], CLIENT))["counted"]
        await repository.close()

    asyncio.run(scenario())


def test_feedback_that_cannot_be_matched_is_refused(bundle, tmp_path):
    async def scenario():
        repository = await make_repository(bundle, tmp_path)
        with pytest.raises(NotFound, match="no request 'never' is known"):
            await repository.feedback("digits", "never", ["1"], CLIENT)
        few = await make_repository(bundle, tmp_path, log={"sample_rate": 1e-9})
        assert (await few.feedback("digits", "never", ["1"], CLIENT))["counted"] is False
        none = await make_repository(bundle, tmp_path, log={"sample_rate": 0})
        with pytest.raises(BadRequest, match="sample_rate"):
            await none.feedback("digits", "never", ["1"], CLIENT)

    asyncio.run(scenario())


def test_a_state_that_cannot_be_written_is_reported_once(bundle, tmp_path, caplog):
    async def scenario():
        repository = await make_repository(bundle, tmp_path)
        blocking = tmp_path / "monitor"
        blocking.write_text("no folder")
        await repository.collect(predicted("a", "1"))
        await repository.feedback("digits", "a", ["1"], CLIENT)
        for _ in range(3):
            await repository._tick()
        assert caplog.text.count("cannot be written") == 1
        blocking.unlink()
        await repository._tick()
        state = json.loads((blocking / "digits.json").read_text())
        assert state["versions"]["3"]["feedback"]["value"] == 1
        assert state["production"] == "3"
        await repository.close()

    asyncio.run(scenario())


def test_a_version_that_is_no_longer_served_is_not_monitored(bundle, tmp_path):
    async def scenario():
        repository = await make_repository(bundle, tmp_path)
        await repository.collect(predicted("a", "1"))
        await repository.feedback("digits", "a", ["1"], CLIENT)
        assert "live_accuracy" in await repository.metrics()
        other = ServingState(1, "digits", "4", {"4": str(bundle.path)})
        await repository._publisher.publish(other)
        await repository._tick()
        assert list((await repository.stats())["monitor"]) == ["4"]
        assert await repository.metrics() == {}
        await repository.close()

    asyncio.run(scenario())
