"""Confidence intervals and tests for metrics of a sample of records.

All intervals have 95 % confidence. Intervals and tests of a fixed sample are valid for one look at
the data. Decisions that are checked repeatedly while data arrive use evidence, which is valid at
every look: a decision made at an evidence of 40 or more is wrong in at most 2.5 % of cases.

Shapes: N records or other independent units, K classes, G groups, S sequences.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np

# Quantile of the standard normal distribution at 0.975.
Z_95 = 1.959964
# Variance of the normal mixture times the number of values at which its power is highest:
# -2 log(a) + log(1 - 2 log(a)) for an evidence of 1 / a, with a = 0.025.
SPREAD = 9.5
# Number of permutations that a permutation test draws.
NUM_PERMUTATIONS = 199
# For codes_beat_ranges: the number of ranges, each with about as many records, and the weight, in
# records, of the value towards which a mean is shrunk.
NUM_RANGES, LEANING = 32, 5.0
# Largest logarithm of evidence, because exp() of more overflows.
MAX_LOG = 700.0
# Weight of the prior of a quantile's rank, in values. The power is highest at about ten times as
# many values.
PRIOR_COUNT = 200


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, `correct` of `count` > 0 records.

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
    """Return the interval of the mean of `after_N - before_N`, paired values of N records.

    binary: whether all values are 0 or 1. If so, the result is the "Wald+2" interval of Agresti and
    Min, Statistics in Medicine 24 (2005), pages 729 to 740: half a record is added to each of the
    four cells, because the interval would be too narrow if few records differ. Otherwise the mean
    of at least two differences is assumed to be normally distributed.
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
    """Return the two-sided p-value of the exact sign test; for classes it is McNemar's test.

    It is twice the smaller tail of the binomial distribution of `better + worse` trials with
    probability 1/2, at most 1.
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
    """Return the bootstrap percentile interval of a statistic of `count` records.

    statistic: int [N], indices of records drawn with replacement → the statistic of these records.
    A NaN (undefined for a draw) is ignored. The draws are the same in every call.
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    draws = np.random.default_rng(0)
    values = [statistic(draws.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


# Decisions that are checked while data arrive


class BoundedMeanEvidence:
    """Evidence that the mean of values in [0, 1] is above `mean`, valid at any number of values.

    If their mean is `mean` or less, the probability that the evidence ever reaches 1 / a is at most
    a, however often it is checked. The evidence is the largest wealth so far of a gambler who bets
    on each value using the earlier values: Waudby-Smith and Ramdas, Estimating means of bounded
    random variables by betting, Journal of the Royal Statistical Society B 86 (2024), section 4 and
    appendix B. The bound only requires that the expectation of each value, given the earlier ones,
    is at most `mean`.
    """

    def __init__(self, mean: float) -> None:
        self._mean = mean
        # The running mean and variance start with one prior value: `mean`, with a variance of 1/4.
        self.count = 0
        self._sum: Any = mean
        self._squares: Any = 0.25
        self._log_wealth: Any = np.float64(0)
        self._largest: Any = np.float64(0)

    def add(self, value: float | np.ndarray) -> None:
        """Add the next value: a number, or float [S] with one value for each of S sequences."""
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
        """The evidence so far: a number, or float [S] for S sequences."""
        return np.exp(np.minimum(self._largest, MAX_LOG))


class MeanEvidence:
    """Evidence that the mean of unbounded values is above 0; see `BoundedMeanEvidence`.

    It is the likelihood ratio of a mixture of normal alternatives: Robbins, Annals of Mathematical
    Statistics 41 (1970), and Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Annals of Statistics
    52 (2024). It is computed from the value number `first` on, where the mean must be nearly
    normally distributed. The power is highest at about 10 * `first` values.
    """

    def __init__(self, first: int) -> None:
        self._first, self._spread = max(first, 2), SPREAD / (10 * first)
        self.count = 0
        self._sum: Any = np.float64(0)
        self._squares: Any = np.float64(0)
        self._largest: Any = np.float64(0)

    def add(self, value: float | np.ndarray) -> None:
        """Add the next value: a number, or float [S] with one value for each of S sequences."""
        self.count += 1
        self._sum, self._squares = self._sum + value, self._squares + np.square(value)
        if self.count < self._first:
            return
        mean = self._sum / self.count
        variance = np.maximum(self._squares / self.count - mean**2, np.finfo(float).tiny)
        weight = 1 + self.count * self._spread
        # A mean below 0 gives no evidence.
        score = np.maximum(self._sum, 0) * np.sqrt(self._spread / (variance * weight))
        log = np.log(1 + _erf(score / math.sqrt(2))) - np.log(weight) / 2 + score**2 / 2
        self._largest = np.maximum(self._largest, log)

    @property
    def value(self) -> Any:
        """The evidence so far: a number, or float [S] for S sequences."""
        return np.exp(np.minimum(self._largest, MAX_LOG))


_erf = np.vectorize(math.erf, otypes=[float])


def binomial_evidence(
    hits: int, count: int, share: float, prior: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Return the evidence from `hits` of `count` that the probability of a hit is not `share`.

    If the probability is `share`, the chance that the evidence ever reaches 1 / a is at most a. The
    evidence is the likelihood under a probability drawn from the beta distribution with the
    parameters `prior`, divided by the likelihood under `share`. Robbins, Annals of Mathematical
    Statistics 41 (1970), section 5.
    """
    a, b = prior
    log = _log_beta(hits + a, count - hits + b) - _log_beta(a, b)
    log -= hits * math.log(share) + (count - hits) * math.log1p(-share)
    return math.exp(min(log, MAX_LOG))


def quantile_ranks(count: int, share: float, alpha: float) -> tuple[int, int]:
    """Return the ranks of the two values between which a quantile lies, valid at every `count`.

    Ranks count from 1, in ascending order of the `count` values. Rank 0 or `count` + 1 means that
    the quantile is not bounded on that side. share: level of the quantile, such as 0.9. alpha: the
    probability that the quantile ever lies outside. The values must be independent and identically
    distributed. The ranks are those that `binomial_evidence` of the number of values below the
    quantile does not rule out.
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
    """Return the p-value of the hypothesis that a target does not depend on the group of a record.

    This is a permutation test of the sum of squares between groups, with each target column scaled
    to unit standard deviation. For classes it is the chi-squared statistic, for numbers the F
    statistic. The test is exact for small groups, too. See Good, Permutation, Parametric and
    Bootstrap Tests of Hypotheses, 2005.

    codes_N: int [N], the group of each record, from 0. targets_N: numbers, float [N], or indicators
    of classes, 0 or 1 [N, K].
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
    """Return how much better a target is predicted per value than per range of values.

    The two predictions are the mean target of the records with the same value, and of the records
    in the same range of values. The result is the difference of their squared errors in standard
    errors. It is large for codes, whose order carries no information. For numbers such as an age it
    is small or below 0, because the mean of a range is based on more records. The means of one half
    of the records predict the other half, and vice versa. The mean of a value is shrunk towards the
    mean of its range.

    values_N: numbers, float [N]. targets_N: numbers, float [N], or indicators of classes, 0 or 1
    [N, K].
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
    """Return the means of groups, float64 [G], each shrunk towards its value in `to_G`."""
    counts_G = np.bincount(groups_N, minlength=len(to_G))
    sums_G = np.bincount(groups_N, values_N, minlength=len(to_G))
    means_G: np.ndarray = (sums_G + LEANING * to_G) / (counts_G + LEANING)
    return means_G
