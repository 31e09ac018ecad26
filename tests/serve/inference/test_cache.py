"""The response cache, with computations that a test counts and delays."""

import asyncio
import sys

import numpy as np
import pytest

from serve.errors import DeadlineExceeded, Overloaded
from serve.inference.cache import ResponseCache
from serve.telemetry.metrics import VersionMetrics


class Engine:
    def __init__(self):
        self.calls = 0
        self.free = asyncio.Event()
        self.error = None

    async def compute(self):
        self.calls += 1
        await self.free.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return {"y": np.full(10, self.calls, np.float32)}


def rows(value):
    return {"x": np.full((1, 4), value, np.float32)}


def make(max_bytes=10_000, ttl_s=60):
    metrics = VersionMetrics()
    return ResponseCache(max_bytes, ttl_s, "digest int8", metrics), Engine(), metrics


def later(seconds=60):
    return asyncio.get_running_loop().time() + seconds


def test_equal_requests_are_computed_once_even_if_concurrent():
    async def scenario():
        cache, engine, metrics = make()
        asked = [asyncio.create_task(cache.answer(rows(1), later(), engine.compute)) for _ in "abc"]
        await asyncio.sleep(0)
        engine.free.set()
        answers = [*await asyncio.gather(*asked), await cache.answer(rows(1), 0, engine.compute)]
        assert engine.calls == 1
        assert all(answer["y"].tolist() == [1] * 10 for answer in answers)
        assert metrics.cache == {"miss": 1, "shared": 2, "hit": 1}

    asyncio.run(scenario())


def test_other_inputs_shapes_and_types_are_computed_anew():
    async def scenario():
        cache, engine, _ = make()
        engine.free.set()
        variants = [
            rows(1),
            rows(2),
            {"z": rows(1)["x"]},
            {"x": rows(1)["x"].reshape(4, 1)},
            {"x": rows(1)["x"].view(np.int32)},
        ]
        for inputs in variants:
            await cache.answer(inputs, later(), engine.compute)
        assert engine.calls == len(variants)

    asyncio.run(scenario())


def test_a_waiting_request_computes_if_the_first_fails():
    async def scenario():
        cache, engine, _ = make()
        engine.error = Overloaded("full")
        first = asyncio.create_task(cache.answer(rows(1), later(), engine.compute))
        second = asyncio.create_task(cache.answer(rows(1), later(), engine.compute))
        await asyncio.sleep(0)
        engine.free.set()
        with pytest.raises(Overloaded):
            await first
        assert (await second)["y"].tolist() == [2] * 10

    asyncio.run(scenario())


def test_each_waiting_request_keeps_its_own_deadline():
    async def scenario():
        cache, engine, _ = make()
        first = asyncio.create_task(cache.answer(rows(1), later(), engine.compute))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await cache.answer(rows(1), later(0.05), engine.compute)
        engine.free.set()
        assert (await first)["y"].tolist() == [1] * 10

    asyncio.run(scenario())


@pytest.mark.parametrize("word", ["a" * 100, "д" * 100, "😀" * 100], ids=["ascii", "2", "4 bytes"])
def test_the_memory_of_texts_counts(word):
    async def scenario():
        cache, _, _ = make()

        async def compute():
            return {"label": np.array([word, word], dtype=object)}

        await cache.answer(rows(1), later(), compute)
        assert cache.size_bytes >= 2 * (sys.getsizeof(word) + 8)

    asyncio.run(scenario())


def test_memory_is_bounded_and_the_oldest_entry_is_evicted():
    async def scenario():
        cache, engine, _ = make(max_bytes=2_000)
        engine.free.set()
        for value in (1, 2, 3, 1, 4):
            await cache.answer(rows(value), later(), engine.compute)
        assert engine.calls == 4
        assert 0 < cache.size_bytes <= 2_000
        await cache.answer(rows(1), later(), engine.compute)
        assert engine.calls == 4
        await cache.answer(rows(2), later(), engine.compute)
        assert engine.calls == 5

    asyncio.run(scenario())
