"""The batcher, with an engine whose batches wait until a test releases them."""

import asyncio
import threading

import numpy as np
import pytest

from serve.errors import DeadlineExceeded, Overloaded
from serve.inference.batcher import SHORT_S, Batcher
from serve.inference.latency_model import LatencyModel
from serve.inference.request_options import RequestOptions


def long():
    """Return the latencies of batches that are so long that they run in the engine's thread."""
    return LatencyModel([1, 4], [2 * SHORT_S, 4 * SHORT_S])


class HeldEngine:
    """An engine that doubles its input; each batch waits until the test releases it."""

    def __init__(self):
        self.batches: list[list[float]] = []
        self.free = threading.Semaphore(0)

    def run(self, rows):
        self.batches.append(rows["x"].tolist())
        self.free.acquire(timeout=30)
        if 13 in rows["x"]:
            raise ValueError("unlucky")
        return {"y": rows["x"] * 2}


def rows(*values):
    return {"x": np.array(values, np.float32)}


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def make(profile=None, **limits):
    engine = HeldEngine()
    return engine, Batcher(engine.run, profile or long(), **{"max_batch_rows": 4, **limits})


def ask(batcher, *values, seconds=60, **terms):
    deadline = asyncio.get_running_loop().time() + seconds
    return batcher.submit(rows(*values), RequestOptions(deadline, **terms))


async def busy(**limits):
    """Return a batcher whose engine is running a batch with the row 0."""
    engine, batcher = make(**limits)
    first = ask(batcher, 0)
    await until(lambda: engine.batches == [[0]])
    return engine, batcher, first


def test_requests_that_wait_for_the_engine_share_its_next_batch():
    async def scenario():
        engine, batcher, first = await busy()
        answers = [first, *(ask(batcher, i) for i in (1, 2, 3))]
        engine.free.release(2)
        results = await asyncio.gather(*answers)
        assert engine.batches == [[0], [1, 2, 3]]
        assert [result["y"].tolist() for result in results] == [[0], [2], [4], [6]]

    asyncio.run(scenario())


def test_large_requests_are_split_so_that_batches_are_full():
    async def scenario():
        engine, batcher, first = await busy(max_queue_rows=100)
        large = ask(batcher, *range(1, 7))
        small = ask(batcher, 7, 8)
        engine.free.release(10)
        await first
        assert (await large)["y"].tolist() == [2 * i for i in range(1, 7)]
        assert (await small)["y"].tolist() == [14, 16]
        assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]

    asyncio.run(scenario())


def test_a_failing_row_does_not_fail_other_requests():
    async def scenario():
        engine, batcher, first = await busy()
        answers = [ask(batcher, i) for i in (1, 13, 2)]
        engine.free.release(20)
        await first
        results = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(result) for result in results] == [dict, ValueError, dict]
        assert [results[0]["y"].tolist(), results[2]["y"].tolist()] == [[2], [4]]

    asyncio.run(scenario())


def test_a_cancelled_request_is_not_computed_nor_counted():
    async def scenario():
        engine, batcher, first = await busy()
        gone, stays = ask(batcher, 1), ask(batcher, 2)
        assert batcher.rows == 3
        gone.cancel()
        await until(lambda: batcher.rows == 2)
        engine.free.release(2)
        await asyncio.gather(first, stays)
        assert engine.batches == [[0], [2]]

    asyncio.run(scenario())


def test_a_request_past_its_deadline_fails_while_engine_is_busy():
    async def scenario():
        engine, batcher, first = await busy()
        late = ask(batcher, 1, seconds=0.2)
        with pytest.raises(DeadlineExceeded):
            await late
        assert not first.done()
        engine.free.release(2)
        await first
        assert engine.batches == [[0]]

    asyncio.run(scenario())


def test_requests_that_would_be_late_get_retry_after_at_once():
    async def scenario():
        engine, batcher, first = await busy(profile=LatencyModel([4], [1.0]), max_batch_rows=4)
        waiting = [ask(batcher, i) for i in range(8)]
        # About one second for the running batch, two for the queue, a quarter for its own row.
        with pytest.raises(Overloaded) as refused:
            ask(batcher, 9, seconds=1.5)
        assert refused.value.reason == "deadline"
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 3
        ask(batcher, 9, seconds=10)
        engine.free.release(10)
        await asyncio.gather(first, *waiting)

    asyncio.run(scenario())


def test_the_queue_is_bounded():
    async def scenario():
        engine, batcher, first = await busy(max_queue_rows=2)
        waiting = [first, ask(batcher, 1), ask(batcher, 2)]
        with pytest.raises(Overloaded, match="2 rows are waiting") as refused:
            ask(batcher, 3)
        assert refused.value.reason == "queue_full"
        engine.free.release(2)
        await asyncio.gather(*waiting)

    asyncio.run(scenario())


def test_checking_for_room_evicts_no_request():
    async def scenario():
        engine, batcher, first = await busy(max_queue_rows=6)
        greedy = [ask(batcher, i, client="greedy") for i in range(1, 7)]
        for _ in range(3):
            assert batcher.check(
                1, RequestOptions(asyncio.get_running_loop().time() + 60, 1, "modest")
            )
        assert not any(answer.done() for answer in greedy)
        engine.free.release(10)
        await asyncio.gather(first, *greedy)

    asyncio.run(scenario())


def test_an_urgent_request_ends_the_wait_for_a_full_batch():
    async def scenario():
        engine, batcher = make(wait_s=30)
        engine.free.release(10)
        patient = ask(batcher, 1, priority=2)
        await asyncio.sleep(0.01)
        await ask(batcher, 2, seconds=0.3, priority=1)
        await patient
        assert engine.batches == [[2, 1]]

    asyncio.run(scenario())


def test_a_full_queue_makes_room_for_a_smaller_client():
    async def scenario():
        engine, batcher, first = await busy(max_queue_rows=6)
        greedy = [ask(batcher, i, client="greedy") for i in range(1, 7)]
        modest = ask(batcher, 9, client="modest")
        with pytest.raises(Overloaded):
            await greedy[-1]
        engine.free.release(10)
        await asyncio.gather(first, modest, *greedy[:-1])

    asyncio.run(scenario())


def test_clients_take_turns_and_priorities_go_first():
    async def scenario():
        engine, batcher, first = await busy(max_batch_rows=1)
        waiting = [ask(batcher, i, client="a", priority=2) for i in (1, 2, 3)]
        waiting += [ask(batcher, i, client="b", priority=2) for i in (11, 12)]
        waiting += [ask(batcher, 21, client="a", priority=1)]
        engine.free.release(10)
        await asyncio.gather(first, *waiting)
        assert engine.batches == [[0], [21], [1], [11], [2], [12], [3]]

    asyncio.run(scenario())


def test_an_idle_engine_waits_for_a_full_batch_up_to_wait_ms():
    async def scenario():
        engine, batcher = make(wait_s=30)
        engine.free.release(10)
        full = [ask(batcher, i) for i in range(4)]
        await asyncio.gather(*full)
        assert engine.batches == [[0, 1, 2, 3]]
        # The slack of this request runs out long before the wait ends.
        await ask(batcher, 5, seconds=0.3)
        assert engine.batches[1:] == [[5]]

    asyncio.run(scenario())


def test_a_short_batch_of_joint_arrivals_runs_without_a_thread():
    async def scenario():
        seen = []

        def run(batch):
            seen.append((threading.current_thread(), batch["x"].tolist()))
            return batch

        batcher = Batcher(
            run, LatencyModel([1, 64], [SHORT_S / 10, SHORT_S / 2]), max_batch_rows=64
        )
        await asyncio.gather(*(ask(batcher, i) for i in range(5)))
        assert seen == [(threading.main_thread(), [0, 1, 2, 3, 4])]

    asyncio.run(scenario())


def test_requests_are_admitted_again_after_a_standstill():
    async def scenario():
        profile = LatencyModel([1], [2 * SHORT_S])
        engine, batcher = make(profile=profile)
        engine.free.release(1000)
        profile.ratio = 1e6
        for _ in range(200):
            await ask(batcher, 1, seconds=1)
        assert profile.ratio < 10

    asyncio.run(scenario())


def test_failed_batches_do_not_change_the_latency_model():
    """If quick failures counted, long batches would then run on the event loop."""

    async def scenario():
        profile = long()
        engine, batcher = make(profile=profile)
        engine.free.release(1000)
        for _ in range(50):
            with pytest.raises(ValueError, match="unlucky"):
                await ask(batcher, 13)
        assert profile.ratio == 1.0
        assert profile.seconds(1) > SHORT_S
        # A batch that fails in part does not change it either.
        answers = await asyncio.gather(ask(batcher, 1), ask(batcher, 13), return_exceptions=True)
        assert isinstance(answers[1], ValueError)
        assert profile.ratio == 1.0
        await ask(batcher, 1)
        assert profile.ratio != 1.0

    asyncio.run(scenario())


def test_the_latency_ratio_has_a_lower_bound():
    profile = LatencyModel([1], [1.0])
    for _ in range(1000):
        profile.observe(1, 1e-9)
    assert profile.ratio == pytest.approx(0.05)


def test_a_running_batch_counts_as_busy():
    async def scenario():
        engine, batcher, first = await busy()
        before = batcher.running_s
        assert before > 0
        await until(lambda: batcher.running_s > before + 0.01)
        engine.free.release()
        await first
        assert batcher.running_s == 0

    asyncio.run(scenario())
