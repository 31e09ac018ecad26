"""Intervals and tests against scipy, R and simulations of what they claim."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from train.stats import paired_interval, sign_test, wilson_interval


@pytest.mark.parametrize(("correct", "count"), [(0, 3), (7, 9), (50, 100), (1000, 1000)])
def test_the_interval_of_a_proportion_is_scipys(correct, count):
    expected = scipy_stats.binomtest(correct, count).proportion_ci(method="wilson")
    expected = (expected.low, expected.high)
    assert wilson_interval(correct, count) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (3, 9), (40, 22), (600, 500)])
def test_the_p_of_the_sign_test_is_scipys(better, worse):
    count = better + worse
    expected = scipy_stats.binomtest(better, count).pvalue if count else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def pairs(same, gained, lost):
    """Values before and after of records that stay 0, become 1, and become 0."""
    values = np.repeat([[0, 0], [0, 1], [1, 0]], [same, gained, lost], axis=0)
    return values[:, 0], values[:, 1]


@pytest.mark.parametrize(
    ("cells", "low", "high", "tolerance"),
    [
        # diffpropci.mp(b = 40, c = 20, n = 160, conf.level = 0.95) of the R package PropCIs 0.3.
        ((100, 20, 40), -0.21601726, -0.03089632, 1e-7),
        # Agresti, An Introduction to Categorical Data Analysis (2007), section 8.1, without the
        # half records, which matter little for 1144.
        ((905, 132, 107), -0.004, 0.048, 1e-3),
        ((200, 0, 0), -1.959964 / 202, 1.959964 / 202, 1e-9),
    ],
)
def test_the_interval_of_paired_proportions_is_the_published_one(cells, low, high, tolerance):
    interval = paired_interval(*pairs(*cells), binary=True)
    assert interval == pytest.approx((low, high), abs=tolerance)


@pytest.mark.parametrize("count", [50, 400])
def test_the_interval_of_paired_proportions_has_its_coverage(rng, count):
    covered = 0
    for _ in range(1000):
        kinds = rng.choice(3, p=[0.8, 0.125, 0.075], size=count)
        low, high = paired_interval(kinds == 2, kinds == 1, binary=True)
        covered += low <= 0.05 <= high
    assert 0.935 <= covered / 1000 <= 0.975


def test_the_interval_of_paired_means_has_its_coverage(rng):
    covered = 0
    for _ in range(1000):
        before, after = rng.normal(size=(2, 200)) * [[1], [2]] + [[0], [0.3]]
        low, high = paired_interval(before, after, binary=False)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 1000 <= 0.97
