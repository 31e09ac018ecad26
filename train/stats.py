"""Intervals and tests for metrics of a sample of records. All intervals have 95 % confidence.

Intervals and tests of a fixed sample may be looked at once. Decisions that are looked for again
while data arrive are made by evidence, which holds at every look: a decision by evidence of 40 or
more is wrong in 2.5 % of cases at most.

Shapes: N records, or other independent units.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np

# Quantile of the standard normal distribution at 0.975.
Z_95 = 1.959964
# The variance of the mixture that is most powerful for evidence of 1 / 0.025, times the number of
# values: -2 log(a) + log(1 - 2 log(a)).
SPREAD = 9.5
# How many permutations a permutation test draws.
NUM_PERMUTATIONS = 199
# Of numbers, those that hold equally many records; and of means, the weight of what they lean to.
NUM_RANGES, LEANING = 32, 5.0
# The largest logarithm of evidence; exp() of more overflows.
MAX_LOG = 700.0
# Values that the prior of a quantile's rank counts for: most powerful at about ten times as many.
PRIOR_COUNT = 200


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the score interval of a proportion, `correct` of `count` > 0 records.

    Wilson, Journal of the American Statistical Association 22 (1927), pages 209 to 212.
    """
    proportion, weight = correct / count, Z_95**2 / count
    centre = (proportion + weight / 2) / (1 + weight)
    variance = proportion * (1 - proportion) / count + weight / (4 * count)
    half = Z_95 / (1 + weight) * math.sqrt(variance)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def paired_interval(
    before_N: np.ndarray, after_N: np.ndarray, *, binary: bool
) -> tuple[float, float]:
    """Return the interval of the mean of `after_N - before_N`, values of the same records.

    binary: whether the values are 0 or 1. Then it is the interval "Wald+2" of Agresti and Min,
    Statistics in Medicine 24 (2005), pages 729 to 740: half a record is added to each of the four
    cells, without which intervals are too short where few records differ. Else the mean of at
    least two differences is taken as normal.
    """
    differences_N = np.asarray(after_N, np.float64) - np.asarray(before_N, np.float64)
    if not binary:
        middle = float(differences_N.mean())
        half = Z_95 * float(differences_N.std(ddof=1)) / math.sqrt(len(differences_N))
        return middle - half, middle + half
    count = len(differences_N) + 2
    total, discordant = float(differences_N.sum()), float(np.abs(differences_N).sum()) + 1
    half = Z_95 * math.sqrt(discordant - total**2 / count) / count
    return max(total / count - half, -1.0), min(total / count + half, 1.0)


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p of the exact sign test, which for classes is McNemar's.

    It is twice the smaller tail of the binomial distribution of `better + worse` at one half.
    """
    count = better + worse
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        for k in range(min(better, worse) + 1)
    ]
    tail = math.fsum(math.exp(log - count * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int = 1000
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of `count` records.

    statistic: indices of records [N], drawn with replacement → its value for them; one that is
    undefined for a draw (NaN) is left out. The draws are the same in each call.
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    draws = np.random.default_rng(0)
    values = [statistic(draws.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


# Decisions while data arrive


class BoundedMeanEvidence:
    """Evidence that values in [0, 1] have a larger mean than `mean`, at any number of them.

    If their mean is `mean` or less, the chance that the evidence ever reaches 1 / a is at most a,
    however often it is looked at. It is the largest wealth so far of a gambler who bets on each
    value by what is known from those before: Waudby-Smith and Ramdas, Estimating means of bounded
    random variables by betting, Journal of the Royal Statistical Society B 86 (2024), section 4 and
    appendix B. That asks only that each value's expectation, given those before, is at most `mean`.
    """

    def __init__(self, mean: float) -> None:
        self._mean = mean
        # A value of `mean` with a variance of 1/4 counts as if it had been seen.
        self.count = 0
        self._sum: Any = mean
        self._squares: Any = 0.25
        self._log_wealth: Any = np.float64(0)
        self._largest: Any = np.float64(0)

    def add(self, value: float | np.ndarray) -> None:
        """value: the next one; for several sequences at once an array with one of each."""
        gain = self._sum / (self.count + 1) - self._mean
        variance = self._squares / (self.count + 1)
        bet = np.clip(gain / (variance + gain**2), 0, 0.75 / max(self._mean, 1e-9))
        self._log_wealth = self._log_wealth + np.log1p(bet * (value - self._mean))
        self._largest = np.maximum(self._largest, self._log_wealth)
        self.count += 1
        self._sum = self._sum + value
        self._squares = self._squares + (value - self._sum / (self.count + 1)) ** 2

    @property
    def value(self) -> Any:
        """The evidence so far; an array for several sequences."""
        return np.exp(np.minimum(self._largest, MAX_LOG))


class MeanEvidence:
    """Evidence that values without bounds have a mean above 0; see `BoundedMeanEvidence`.

    That of a mixture of normal alternatives, from the value `first` on, at which their mean must be
    nearly normal: Robbins, Annals of Mathematical Statistics 41 (1970), and Waudby-Smith, Arbour,
    Sinha, Kennedy and Ramdas, Annals of Statistics 52 (2024). It is most powerful at about ten
    times as many.
    """

    def __init__(self, first: int) -> None:
        self._first, self._spread = max(first, 2), SPREAD / (10 * first)
        self.count = 0
        self._sum: Any = np.float64(0)
        self._squares: Any = np.float64(0)
        self._largest: Any = np.float64(0)

    def add(self, value: float | np.ndarray) -> None:
        """value: the next one; for several sequences at once an array with one of each."""
        self.count += 1
        self._sum, self._squares = self._sum + value, self._squares + np.square(value)
        if self.count < self._first:
            return
        mean = self._sum / self.count
        variance = np.maximum(self._squares / self.count - mean**2, np.finfo(float).tiny)
        weight = 1 + self.count * self._spread
        # A mean below 0 is no evidence.
        score = np.maximum(self._sum, 0) * np.sqrt(self._spread / (variance * weight))
        log = np.log(1 + _erf(score / math.sqrt(2))) - np.log(weight) / 2 + score**2 / 2
        self._largest = np.maximum(self._largest, log)

    @property
    def value(self) -> Any:
        """The evidence so far; an array for several sequences."""
        return np.exp(np.minimum(self._largest, MAX_LOG))


_erf = np.vectorize(math.erf, otypes=[float])


def binomial_evidence(
    hits: int, count: int, share: float, prior: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Return the evidence that the chance of a hit is another than `share`, `hits` of `count`.

    The chance that it ever reaches 1 / a is at most a if it is `share`. It is the ratio of the
    likelihood under a chance drawn from the beta distribution with the parameters `prior` to that
    under `share`: Robbins, Annals of Mathematical Statistics 41 (1970), section 5.
    """
    a, b = prior
    log = _log_beta(hits + a, count - hits + b) - _log_beta(a, b)
    log -= hits * math.log(share) + (count - hits) * math.log1p(-share)
    return math.exp(min(log, MAX_LOG))


def quantile_ranks(count: int, share: float, alpha: float) -> tuple[int, int]:
    """Return the ranks between whose values a quantile lies, at every number of values.

    Of `count` values in ascending order, ranks from 1; a rank of 0 or of `count` + 1 means that the
    quantile is not bounded on that side. alpha: the chance that it ever lies outside. For
    independent values of one distribution, as `binomial_evidence` of those below it.
    """
    prior = PRIOR_COUNT * share, PRIOR_COUNT * (1 - share)

    def possible(hits: int) -> bool:
        return binomial_evidence(hits, count, share, prior) < 1 / alpha

    middle = min(count, round(share * count))
    low = bisect_left(range(middle), True, key=possible)
    above = range(middle, count + 1)
    high = middle + bisect_left(above, True, key=lambda hits: not possible(hits)) - 1
    return low, high + 1


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def association_p_value(codes_N: np.ndarray, targets_N: np.ndarray) -> float:
    """Return the p-value of a target that is the same in all groups of records.

    A permutation test of the sum of squares between groups, with each column in its deviations: of
    classes that is the chi-squared statistic, of numbers the F statistic. It is exact where groups
    are small, too. See Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005.

    codes_N: the group of each record, from 0. targets_N: numbers [N], or 0 and 1 of classes [N, K].
    """
    targets_NK = np.asarray(targets_N, np.float64).reshape(len(targets_N), -1)
    spread_K = targets_NK.std(axis=0)
    scaled_KN = ((targets_NK - targets_NK.mean(axis=0)) / np.where(spread_K > 0, spread_K, 1)).T
    counts = np.maximum(np.bincount(codes_N), 1)

    def between_groups(order_N: np.ndarray) -> float:
        return sum(
            float((np.bincount(codes_N, column_N[order_N]) ** 2 / counts).sum())
            for column_N in scaled_KN
        )

    found = between_groups(np.arange(len(codes_N)))
    rng = np.random.Generator(np.random.Philox(0))
    as_large = sum(
        between_groups(rng.permutation(len(codes_N))) >= found * (1 - 1e-12)
        for _ in range(NUM_PERMUTATIONS)
    )
    return (as_large + 1) / (NUM_PERMUTATIONS + 1)


def codes_beat_ranges(values_N: np.ndarray, targets_N: np.ndarray) -> float:
    """Return by how many standard errors a target is better predicted by each value's own mean than
    by the mean of the range that the value is in.

    Of codes, whose order says nothing, it is large; of numbers such as an age below zero or small,
    as means of ranges rest on more records. Means are of one half of the records, errors of the
    other, in turns; those of values lean to the mean of their range.

    values_N: numbers [N]. targets_N: numbers [N], or 0 and 1 of classes [N, K].
    """
    targets_NK = np.asarray(targets_N, np.float64).reshape(len(targets_N), -1)
    codes_N = np.unique(values_N, return_inverse=True)[1]
    edges = np.unique(np.quantile(values_N, np.linspace(0, 1, NUM_RANGES + 1)[1:-1]))
    ranges_N = np.searchsorted(edges, values_N, side="right")
    halves_N = np.random.Generator(np.random.Philox(0)).permutation(len(values_N)) % 2
    gains_N = np.zeros(len(values_N))
    for half in (0, 1):
        learned_N, judged_N = halves_N != half, halves_N == half
        for target_N in targets_NK.T:
            known_N = target_N[learned_N]
            middle = np.full(len(edges) + 1, known_N.mean())
            of_range = _leaning_means(ranges_N[learned_N], known_N, middle)
            range_of_code = np.zeros(codes_N.max() + 1, int)
            range_of_code[codes_N] = ranges_N
            of_code = _leaning_means(codes_N[learned_N], known_N, of_range[range_of_code])
            truth_N = target_N[judged_N]
            gains_N[judged_N] += (of_range[ranges_N[judged_N]] - truth_N) ** 2
            gains_N[judged_N] -= (of_code[codes_N[judged_N]] - truth_N) ** 2
    spread = float(gains_N.std())
    return float(gains_N.mean()) / spread * math.sqrt(len(gains_N)) if spread > 0 else 0.0


def _leaning_means(groups_N: np.ndarray, values_N: np.ndarray, to_G: np.ndarray) -> np.ndarray:
    """Means of groups, each with the weight of a few more records of another value."""
    counts_G = np.bincount(groups_N, minlength=len(to_G))
    sums_G = np.bincount(groups_N, values_N, minlength=len(to_G))
    means_G: np.ndarray = (sums_G + LEANING * to_G) / (counts_G + LEANING)
    return means_G
