"""Requests that differ in length: the fitted time of a batch, and which requests share one."""

import asyncio
import itertools
import threading

import numpy as np
import pytest

from serve.errors import Overloaded
from serve.inference.batcher import SHORT_S, Batcher
from serve.inference.latency_model import BATCH_S, WORTH, LatencyModel, LengthModel
from serve.inference.queued_request import STRETCH
from serve.inference.request_options import RequestOptions
from serve.telemetry.metrics import VersionMetrics
from train.bundle import cost_model
from train.bundle.cost_model import CostModel
from train.bundle.manifest import BATCH_SIZES, Timing, Variant

# Seconds of a call, of a row, of a position and of a pair of positions.
TERMS = (3 * SHORT_S, 0.001, 0.001, 1e-6)


def seconds(rows, length, terms=TERMS):
    call, row, position, pair = terms
    return call + rows * (row + length * (position + length * pair))


def timings(terms=TERMS, typical=50, noise=None):
    """Return measurements as compression makes them, those of the typical length first."""
    sizes = [(rows, typical) for rows in BATCH_SIZES]
    sizes += [(rows, length) for length in (10, 100, 200) for rows in (1, 4, 16)]
    return [
        Timing(
            engine="e",
            threads=1,
            batch_size=rows,
            length=length,
            p50_ms=1e3 * seconds(rows, length, terms) * (noise.lognormal(0, 0.03) if noise else 1),
            low_ms=0,
            high_ms=1e9,
        )
        for rows, length in sizes
    ]


def test_the_fit_finds_the_terms_of_the_time(rng):
    model = cost_model.fit_timings(timings())
    np.testing.assert_allclose(model.coefficients_C, TERMS, rtol=1e-6)
    noisy = timings(noise=rng)
    model = cost_model.fit_timings(noisy)
    for rows, length in [(3, 30), (24, 70), (1, 150), (7, 256)]:
        assert model.seconds(rows, length) == pytest.approx(seconds(rows, length), rel=0.1)
    errors = cost_model.held_out_errors(noisy)
    assert len(errors) == len(noisy)
    assert np.median(errors) < 0.05
    assert np.all(np.array(model.coefficients_C) >= 0)


def test_held_out_errors_show_a_time_that_does_not_fit():
    """The time of one size is far from the formula; a fit with it would hide that."""
    given = timings()
    odd = given[3].model_copy(update={"p50_ms": 3 * given[3].p50_ms})
    errors = cost_model.held_out_errors([*given[:3], odd, *given[4:]])
    assert errors[3] == pytest.approx(2 / 3, rel=0.01)
    assert CostModel.fit([1], [5], [0.2]).seconds(1, 5) == pytest.approx(0.2)


def test_a_variant_with_lengths_gets_a_model_of_both():
    variant = Variant.model_construct(engine="e", profile=timings())
    model = LatencyModel.of(variant, 1)
    assert isinstance(model, LengthModel)
    assert model.seconds(4, 100) == pytest.approx(seconds(4, 100))
    assert model.seconds(4) == pytest.approx(seconds(4, 50)), "the median length"
    assert variant.ms(32) == pytest.approx(1e3 * seconds(32, 50))
    for _ in range(100):
        model.observe(2, 3 * seconds(2, 100), 100)
    assert model.seconds(1, 10) == pytest.approx(3 * seconds(1, 10), rel=0.01)
    assert model.unit_s(8) * model.work(100) > model.unit_s(8) * model.work(10)


def rate(lengths, start, stop):
    rows = stop - start
    useful = sum(seconds(1, length) for length in lengths[start:stop])
    return useful / (seconds(rows, lengths[stop - 1]) + BATCH_S)


@pytest.mark.parametrize("limit_s", [1e9, 0.3, 0.01])
def test_the_best_window_agrees_with_an_exhaustive_search(rng, limit_s):
    model = LengthModel(timings())
    for _ in range(50):
        lengths = np.sort(rng.integers(1, 250, rng.integers(1, 20)))
        anchor, most = int(rng.integers(len(lengths))), int(rng.integers(1, 12))
        allowed = [
            (start, stop)
            for start, stop in itertools.product(
                range(anchor + 1), range(anchor + 1, len(lengths) + 1)
            )
            if stop - start == 1
            or (stop - start <= most and seconds(stop - start, lengths[stop - 1]) <= limit_s)
        ]
        best = max(rate(lengths, *window) for window in allowed)
        found = model.best_window(lengths.tolist(), anchor, most, limit_s)
        assert (found.start, found.stop) in allowed
        duration = seconds(found.stop - found.start, lengths[found.stop - 1])
        assert rate(lengths, found.start, found.stop) >= WORTH * best * (1 - 1e-9)
        for start, stop in allowed:  # none of those that are as good is shorter
            if rate(lengths, start, stop) >= WORTH * best:
                assert seconds(stop - start, lengths[stop - 1]) >= duration * (1 - 1e-9)


class HeldEngine:
    """Returns each row's first value, 10 for the first of them; batches wait until released."""

    def __init__(self):
        self.shapes: list[tuple[int, int]] = []
        self.batches: list[list[int]] = []
        self.free = threading.Semaphore(0)

    def run(self, rows):
        tokens = rows["tokens"]
        self.shapes.append(tokens.shape)
        self.batches.append((tokens != 0).sum(axis=1).tolist())
        self.free.acquire(timeout=30)
        return {"y": tokens[:, 0] * 10, "length": (tokens != 0).sum(axis=1)}


def texts(*lengths):
    """Return texts of these lengths; the first token of each is its number, from 1."""
    tokens = np.zeros((len(lengths), max([1, *lengths]) + 3), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 7
        tokens[row, :1] = (row + 1) * (length > 0)
    return {"tokens": tokens, "number": np.arange(len(lengths))}


def ask(batcher, *lengths, seconds=60, **terms):
    deadline = asyncio.get_running_loop().time() + seconds
    return batcher.submit(texts(*lengths), RequestOptions(deadline, **terms))


async def busy(terms=TERMS, **limits):
    """Return a batcher whose engine is running a text of 20 tokens."""
    engine = HeldEngine()
    limits = {"max_batch_rows": 8, **limits}
    batcher = Batcher(engine.run, LengthModel(timings(terms)), lists=["tokens"], **limits)
    first = ask(batcher, 20)
    async with asyncio.timeout(10):
        while not engine.batches:
            await asyncio.sleep(0)
    return engine, batcher, first


# A net whose calls cost much: batches of different lengths would still be worth it, if padding
# cost nothing.
LINEAR = (3 * SHORT_S, 0.0, 0.001, 0.0)


def test_texts_of_about_equal_length_share_a_batch():
    async def scenario():
        metrics = VersionMetrics()
        engine, batcher, first = await busy(LINEAR, metrics=metrics)
        waiting = [ask(batcher, length) for length in (10, 200, 11, 12, 205)]
        engine.free.release(10)
        await asyncio.gather(first, *waiting)
        assert engine.batches == [[20], [10, 11, 12], [200, 205]]
        assert [shape[1] for shape in engine.shapes[1:]] == [12 + 3, 205 + 3]
        assert metrics.positions["values"] == 20 + 10 + 11 + 12 + 200 + 205
        assert metrics.positions["padding"] == 2 + 1 + 5

    asyncio.run(scenario())


def test_a_request_of_many_texts_is_answered_in_its_order():
    async def scenario():
        engine, batcher, first = await busy(LINEAR)
        lengths = [100, 3, 0, 90, 5, 95, 4]
        answer = ask(batcher, *lengths)
        engine.free.release(10)
        await first
        result = await answer
        assert result["length"].tolist() == lengths
        numbers = [10 * (row + 1) * (length > 0) for row, length in enumerate(lengths)]
        assert result["y"].tolist() == numbers
        assert engine.batches[1] == [0, 3, 4, 5]
        assert list(itertools.chain(*engine.batches[2:])) == [90, 95, 100]
        assert engine.shapes[1][1] == 5, "the shorter part is not padded to the longest text"

    asyncio.run(scenario())


def test_short_texts_overtake_a_long_one_but_not_for_ever():
    async def scenario():
        flat = (0.0, 0.0, 0.001, 0.0)
        engine, batcher, first = await busy(flat, max_batch_rows=1, max_queue_rows=10_000)
        long = ask(batcher, 200)
        short = [ask(batcher, 10) for _ in range(STRETCH * 40)]
        engine.free.release(len(short) + 2)
        await asyncio.gather(first, long, *short)
        place = engine.batches.index([200])
        assert place > 1
        assert place == pytest.approx((STRETCH * (200 - 10) - 200) / 10, abs=3)

    asyncio.run(scenario())


def test_texts_can_be_batched_in_order_of_arrival():
    async def scenario():
        engine, batcher, first = await busy(LINEAR, by_length=False)
        waiting = [ask(batcher, length) for length in (10, 200, 11, 12, 205)]
        engine.free.release(10)
        await asyncio.gather(first, *waiting)
        assert engine.batches == [[20], [10, 200, 11, 12, 205]]

    asyncio.run(scenario())


def test_admission_counts_seconds_and_not_rows():
    async def scenario():
        flat = (0.0, 0.0, 0.001, 0.0)
        engine, batcher, first = await busy(flat)
        waiting = [ask(batcher, 20) for _ in range(10)]  # 0.2 s, and the first one's 0.02 s
        ask(batcher, 10, seconds=0.5)
        with pytest.raises(Overloaded) as refused:
            ask(batcher, 250, seconds=0.5)
        assert refused.value.reason == "deadline"
        assert batcher.load == pytest.approx(0.01 * (2 + 20 + 1) / 0.05)
        engine.free.release(30)
        await asyncio.gather(first, *waiting)
        assert batcher.load == pytest.approx(0, abs=0.3)

    asyncio.run(scenario())


def test_a_text_that_must_wait_too_long_is_refused_in_the_queue():
    async def scenario():
        flat = (0.0, 0.0, 0.001, 0.0)
        engine, batcher, first = await busy(flat)
        late = ask(batcher, 100, seconds=0.2)
        fits = ask(batcher, 100, seconds=5)
        await asyncio.sleep(0.12)
        engine.free.release(5)
        with pytest.raises(Overloaded, match="waited too long"):
            await late
        assert (await fits)["length"].tolist() == [100]
        await first

    asyncio.run(scenario())


def test_urgent_texts_are_not_padded_for_less_urgent_ones():
    async def scenario():
        engine, batcher, first = await busy(LINEAR)
        lesser = [ask(batcher, 100, priority=2) for _ in range(3)]
        urgent = ask(batcher, 90, priority=1)
        engine.free.release(10)
        await asyncio.gather(first, urgent, *lesser)
        assert engine.batches[1:] == [[90], [100, 100, 100]]

    asyncio.run(scenario())
