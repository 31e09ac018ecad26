"""Intervals and tests, against scipy, R and simulations of their coverage."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from train.stats import (
    BoundedMeanEvidence,
    MeanEvidence,
    association_p_value,
    binomial_evidence,
    bootstrap_interval,
    paired_interval,
    quantile_ranks,
    sign_test,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "count"), [(0, 3), (7, 9), (50, 100), (1000, 1000)])
def test_the_interval_of_a_proportion_matches_scipy(correct, count):
    expected = scipy_stats.binomtest(correct, count).proportion_ci(method="wilson")
    expected = (expected.low, expected.high)
    assert wilson_interval(correct, count) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (3, 9), (40, 22), (600, 500)])
def test_the_p_value_of_the_sign_test_matches_scipy(better, worse):
    count = better + worse
    expected = scipy_stats.binomtest(better, count).pvalue if count else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def pairs(same, gained, lost):
    """Return values before and after, for records that stay 0, become 1 and become 0."""
    values = np.repeat([[0, 0], [0, 1], [1, 0]], [same, gained, lost], axis=0)
    return values[:, 0], values[:, 1]


@pytest.mark.parametrize(
    ("cells", "low", "high", "tolerance"),
    [
        # diffpropci.mp(b = 40, c = 20, n = 160, conf.level = 0.95) of the R package PropCIs 0.3.
        ((100, 20, 40), -0.21601726, -0.03089632, 1e-7),
        # Agresti, An Introduction to Categorical Data Analysis (2007), section 8.1. It adds no
        # half records to the cells, which matters little for 1144.
        ((905, 132, 107), -0.004, 0.048, 1e-3),
        ((200, 0, 0), -1.959964 / 202, 1.959964 / 202, 1e-9),
    ],
)
def test_the_interval_of_paired_proportions_matches_publications(cells, low, high, tolerance):
    interval = paired_interval(*pairs(*cells), binary=True)
    assert interval == pytest.approx((low, high), abs=tolerance)


@pytest.mark.parametrize("count", [50, 400])
def test_the_interval_of_paired_proportions_covers_95_percent(rng, count):
    covered = 0
    for _ in range(1000):
        kinds = rng.choice(3, p=[0.8, 0.125, 0.075], size=count)
        low, high = paired_interval(kinds == 2, kinds == 1, binary=True)
        covered += low <= 0.05 <= high
    assert 0.935 <= covered / 1000 <= 0.975


def test_the_interval_of_paired_means_covers_95_percent(rng):
    covered = 0
    for _ in range(1000):
        before, after = rng.normal(size=(2, 200)) * [[1], [2]] + [[0], [0.3]]
        low, high = paired_interval(before, after, binary=False)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_the_bootstrap_interval_matches_scipy(rng):
    values = rng.lognormal(size=150)
    expected = scipy_stats.bootstrap(
        (values,), np.median, n_resamples=1000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    interval = bootstrap_interval(lambda ids: float(np.median(values[ids])), len(values))
    assert interval == pytest.approx((expected.low, expected.high), rel=0.05)


def test_the_bootstrap_agrees_with_the_closed_form(rng):
    before_N, after_N = rng.random(2000) < 0.9, rng.random(2000) < 0.88
    interval = bootstrap_interval(
        lambda ids: float((after_N[ids] * 1.0 - before_N[ids]).mean()), 2000
    )
    expected = paired_interval(before_N, after_N, binary=True)
    np.testing.assert_allclose(interval, expected, atol=0.0035)


def test_bootstrap_draws_with_an_undefined_statistic_are_skipped():
    values = np.array([1.0, 2.0, np.nan])
    low, high = bootstrap_interval(lambda ids: float(values[ids].mean()), 3)
    assert (low, high) == pytest.approx((1, 2), abs=0.01)


def gambler(values, mean):
    """Return the largest wealth when betting the best fraction for the mean and variance so far."""
    wealth = largest = 1.0
    seen = [mean]
    squares = 0.25
    for value in values:
        edge, variance = np.mean(seen) - mean, squares / len(seen)
        bet = min(max(edge / (variance + edge**2), 0), 0.75 / mean)
        wealth *= 1 + bet * (value - mean)
        largest = max(largest, wealth)
        seen.append(value)
        squares += (value - np.mean(seen)) ** 2
    return largest


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.6])
def test_evidence_of_a_bounded_mean_is_a_gamblers_wealth(rng, mean):
    values = rng.beta(3, 2, size=(4, 60))
    evidence = BoundedMeanEvidence(mean)
    for column in values.T:
        evidence.add(column)
    assert evidence.value == pytest.approx([gambler(row, mean) for row in values])


def test_evidence_of_a_mean_is_a_mixture_of_likelihoods(rng):
    """Normal alternatives above 0, integrated numerically with a known variance."""
    values = rng.normal(0.3, 2, size=400)
    evidence = MeanEvidence(400)
    for value in values:
        evidence.add(value)
    variance = values.var()
    effects = np.linspace(0, 2, 200_001)
    prior = 2 * scipy_stats.norm.pdf(effects, scale=np.sqrt(9.5 / 4000 * variance))
    logs = (effects * values.sum() - 400 * effects**2 / 2) / variance
    expected = np.trapezoid(prior * np.exp(logs), effects)
    assert evidence.value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (3, 3), (4, 250)])
def test_evidence_of_a_chance_is_a_ratio_of_likelihoods(hits, count):
    chances = np.linspace(0, 1, 100_001)
    mixture = np.trapezoid(chances**hits * (1 - chances) ** (count - hits), chances)
    expected = mixture / (0.01**hits * 0.99 ** (count - hits))
    assert binomial_evidence(hits, count, 0.01) == pytest.approx(expected, rel=1e-4)


def test_a_quantile_lies_between_its_ranks_at_every_look(rng):
    outside = 0
    for _ in range(300):
        below = np.cumsum(rng.random(2000) < 0.9)
        for count in range(10, 2001, 10):
            low, high = quantile_ranks(count, 0.9, 0.05)
            if not low <= below[count - 1] < high:
                outside += 1
                break
    assert outside / 300 <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 300)
    assert quantile_ranks(10, 0.9, 0.05)[1] == 11
    # The 95 % interval for a fixed sample size has the ranks 1774 and 1827.
    assert quantile_ranks(2000, 0.9, 0.05) == pytest.approx((1800, 1800), abs=60)


def test_groups_that_differ_by_chance_are_seldom_found(rng):
    """In 5 % of cases, although each group has at most one record of a class."""
    found = [
        association_p_value(rng.integers(0, 300, 600), rng.random(600) < 0.05) for _ in range(300)
    ]
    assert np.mean(np.array(found) <= 0.05) < 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 300)


def test_groups_that_differ_are_found_as_scipy_finds_them(rng):
    codes_N = rng.integers(0, 40, 2000)
    for strength in (0.0, 0.1, 0.25, 0.4):
        effects = rng.normal(size=40) * strength
        values_N = rng.normal(size=2000) + effects[codes_N]
        expected = scipy_stats.f_oneway(*(values_N[codes_N == code] for code in range(40))).pvalue
        assert association_p_value(codes_N, values_N) == pytest.approx(expected, abs=0.08)
        classes_N = (values_N > 0).astype(int) + (values_N > 1)
        table = np.zeros((40, 3))
        np.add.at(table, (codes_N, classes_N), 1)
        expected = scipy_stats.chi2_contingency(table).pvalue
        one_hot_NK = np.eye(3)[classes_N]
        # The one-hot columns are linearly dependent, so their weights differ slightly.
        assert association_p_value(codes_N, one_hot_NK) == pytest.approx(expected, abs=0.12)
