"""Drift detection: statistics compared with numpy and scipy, and the rate of false alarms."""

import asyncio
import math

import numpy as np
import pytest
from scipy import stats

from serve.drift import statistics
from serve.drift.sampler import BLOCK_ROWS, DriftSampler
from serve.drift.statistics import draw_thresholds
from serve.drift.windows import DriftMonitor
from train.bundle import feature_statistics
from train.bundle.feature_statistics import Quantity, QuantityValues
from train.tasks import Task

EDGES = (0.0, 1.0, 2.0, 4.0)


def number(counts, edges=EDGES):
    return Quantity("number", "inputs", np.array(counts), edges=edges)


def test_values_are_counted_as_numpy_counts_them():
    values = np.random.default_rng(0).uniform(-1, 5, 1000)
    values[:7] = math.nan
    counts = number([0] * 6).count(values)
    expected, _ = np.histogram(values[7:], bins=EDGES)
    assert counts.tolist() == [7, (values < 0).sum(), *expected, (values > 4).sum()]
    # The last edge belongs to the last bin, as in numpy.
    assert number([0] * 6).count(np.array([4.0])).tolist() == [0, 0, 0, 0, 1, 0]


def test_a_constant_number_has_one_bin():
    constant = number([0] * 4, (3.0, 3.0))
    assert constant.count(np.array([2.0, 3.0, 3.0, 4.0])).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("values", [[0, 1, 1, 0], [1, 2, 3, 3, 2], [0.5], list(range(16))])
def test_each_value_has_its_own_bin_if_there_are_few(values):
    measured = QuantityValues("number", "inputs", np.array(values, float))
    edges = feature_statistics.bin_edges(measured, "n")
    counts = number([0] * (len(edges) + 2), edges).count(measured.values)
    _, expected = np.unique(values, return_counts=True)
    assert counts[2:-1].tolist() == expected.tolist()


def test_bins_of_many_values_have_about_equal_counts():
    values = np.random.default_rng(0).lognormal(size=4000)
    edges = feature_statistics.bin_edges(QuantityValues("number", "inputs", values), "n")
    counts = np.histogram(values, edges)[0]
    assert len(counts) == feature_statistics.NUM_BINS
    assert np.ptp(counts) <= 2


def test_categories_beyond_the_last_bin_share_it():
    category = Quantity("category", "inputs", np.zeros(3, np.int64), labels=("a", "b", "(others)"))
    assert category.count(np.array([0, 1, 2, 7])).tolist() == [1, 1, 2]


def test_ks_equals_scipys_if_each_value_has_a_bin():
    generator = np.random.default_rng(1)
    one, two = generator.integers(0, 6, 300), generator.integers(1, 7, 200)
    expected = stats.ks_2samp(one, two).statistic
    counts = [np.bincount(values, minlength=8) for values in (one, two)]
    assert statistics.ks(*counts) == pytest.approx(expected)


def test_psi_is_the_symmetric_divergence():
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.1, 0.6, 0.3])
    expected = stats.entropy(p, q) + stats.entropy(q, p)
    # Counts so large that the half count that psi() adds has no effect.
    assert statistics.psi(p * 1e9, q * 1e9) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [100, 500])
def test_the_rate_of_false_alarms_is_as_configured(rows):
    generator = np.random.default_rng(2)
    spread = generator.dirichlet(np.ones(18), size=6)
    alarm_rate, repeats, windows = 0.05, 8, 50
    alarmed = 0
    # The baseline is itself a random sample, so draw a new one each time.
    for repeat in range(repeats):
        found = {f"q{i}": number(generator.multinomial(800, p)) for i, p in enumerate(spread)}
        drawn = draw_thresholds(found, rows, alarm_rate, seed=repeat)
        watch = DriftMonitor(found, rows, alarm_rate, drawn)
        for _ in range(windows):
            counts = {f"q{i}": generator.multinomial(rows, p) for i, p in enumerate(spread)}
            alarmed += any(
                score > drawn.of[name][statistic]
                for name, quantity in found.items()
                for statistic, score in statistics.drift_scores(quantity, counts[name]).items()
            )
        assert watch.num_full == 0
    share = alarmed / (repeats * windows)
    # Windows share a baseline, so their alarms are correlated; a binomial bound would be too low.
    assert share <= 2 * alarm_rate
    assert share > 0


def test_a_full_window_names_the_features_that_have_drifted():
    watched = {"age": number([0, 0, 400, 300, 300, 0]), "fare": number([0, 0, 500, 300, 200, 0])}
    windows = DriftMonitor(watched, 2 * BLOCK_ROWS, 0.001, clock=lambda: 0)
    same = {"age": np.array([0, 0, 20, 15, 15, 0]), "fare": np.array([0, 0, 25, 15, 10, 0])}
    assert windows.add(same) is None
    assert windows.add(same).alarms == ()
    older = {**same, "age": np.array([5, 0, 0, 0, 20, 25])}
    windows.add(older)
    window = windows.add(older)
    assert window.time == "1970-01-01T00:00:00+00:00"
    assert {alarm.feature for alarm in window.alarms} == {"age"}
    assert all(alarm.score > alarm.threshold for alarm in window.alarms)
    told = windows.to_dict()["features"]["age"]
    assert (told["missing"], told["out_of_range"]) == (0.1, 0.5)
    samples = {
        (family, labels["feature"]): value
        for family in ("drift_score", "drift_threshold")
        for _, labels, value in windows.snapshot({"model": "m"})[family][2]
    }
    assert samples["drift_score", "age"] > samples["drift_threshold", "age"]
    assert samples["drift_score", "fare"] <= samples["drift_threshold", "fare"]


@pytest.fixture(scope="module")
def baseline(bundle):
    return bundle.quantities


def test_a_bundle_contains_statistics_of_held_out_records(bundle, baseline):
    held_out = bundle.manifest.data["valid"]["num_records"]
    assert {"image.brightness", "image.contrast", "prediction", "confidence"} <= set(baseline)
    for quantity in baseline.values():
        assert (quantity.counts.sum(axis=-1) == held_out).all()
    assert baseline["prediction"].labels == bundle.task.target.classes


def test_a_baseline_in_another_format_is_ignored():
    assert feature_statistics.read_baseline(b'{"num_records": 3, "inputs": {}}') == {}


def rows_of(task: Task, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    probabilities = np.full((count, len(task.target.classes)), 0.1, np.float32)
    return {"image": images}, {"probabilities": probabilities}


def test_the_sampler_stays_within_its_row_rate(bundle, baseline):
    async def watch():
        sampler = DriftSampler(bundle.task, baseline, 10 * BLOCK_ROWS)
        inputs, predictions = rows_of(bundle.task, 7)
        # 100 requests of 7 rows within a tenth of a second.
        for request in range(100):
            sampler.saw(inputs, predictions, 5 + request / 1000)
        async with asyncio.timeout(10):
            while not sampler.sampled:
                await asyncio.sleep(0.001)
        return sampler, sampler.drained()

    sampler, blocks = asyncio.run(watch())
    assert sampler.seen == 700
    # The budget saved before the requests, and that of a tenth of a second.
    assert BLOCK_ROWS <= sampler.sampled <= 2 * BLOCK_ROWS
    assert all(counts.sum(axis=-1).max() == BLOCK_ROWS for counts in blocks[0].values())
    assert set(blocks[0]) == set(baseline)
    assert sampler.drained() == []
