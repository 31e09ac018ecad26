"""The batcher, with an engine that a test holds and frees."""

import asyncio
import threading

import numpy as np
import pytest

from serve.batcher import Batcher
from serve.errors import Overloaded


class HeldEngine:
    """Doubles its input; each batch waits until the test frees it."""

    def __init__(self) -> None:
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


def make(**limits):
    engine = HeldEngine()
    return engine, Batcher(engine.run, **{"max_batch_rows": 4, "max_queue_rows": 8, **limits})


def test_requests_that_wait_for_the_engine_share_its_next_batch():
    async def scenario():
        engine, batcher = make()
        answers = [asyncio.create_task(batcher.submit(rows(0)))]
        await until(lambda: engine.batches == [[0]])
        answers += [asyncio.create_task(batcher.submit(rows(i))) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        engine.free.release(2)
        results = await asyncio.gather(*answers)
        assert engine.batches == [[0], [1, 2, 3]]
        assert [result["y"].tolist() for result in results] == [[0], [2], [4], [6]]

    asyncio.run(scenario())


def test_a_batch_is_never_larger_than_allowed():
    async def scenario():
        engine, batcher = make(max_queue_rows=20)
        engine.free.release(10)
        first = asyncio.create_task(batcher.submit(rows(0)))
        others = [asyncio.create_task(batcher.submit(rows(i, i))) for i in range(1, 4)]
        large = await batcher.submit(rows(*range(10)))
        await asyncio.gather(first, *others)
        assert max(len(batch) for batch in engine.batches) <= 4
        assert large["y"].tolist() == [2 * i for i in range(10)]

    asyncio.run(scenario())


def test_an_error_reaches_its_batch_and_no_other():
    async def scenario():
        engine, batcher = make()
        bad = asyncio.create_task(batcher.submit(rows(13)))
        await until(lambda: engine.batches == [[13]])
        good = asyncio.create_task(batcher.submit(rows(1)))
        engine.free.release(2)
        with pytest.raises(ValueError, match="unlucky"):
            await bad
        assert (await good)["y"].tolist() == [2]

    asyncio.run(scenario())


def test_what_nobody_waits_for_is_not_computed():
    async def scenario():
        engine, batcher = make()
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: engine.batches == [[0]])
        gone = asyncio.create_task(batcher.submit(rows(1)))
        stays = asyncio.create_task(batcher.submit(rows(2)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        engine.free.release(2)
        await asyncio.gather(first, stays)
        assert engine.batches == [[0], [2]]

    asyncio.run(scenario())


def test_the_queue_is_bounded():
    async def scenario():
        engine, batcher = make(max_queue_rows=2)
        waiting = [asyncio.create_task(batcher.submit(rows(0)))]
        await until(lambda: engine.batches == [[0]])
        waiting += [asyncio.create_task(batcher.submit(rows(i))) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 rows are waiting"):
            await batcher.submit(rows(3))
        engine.free.release(2)
        await asyncio.gather(*waiting)

    asyncio.run(scenario())
