"""Intervals and tests for metrics of a sample of records. All intervals have 95 % confidence.

Shapes: N records.
"""

import math

import numpy as np

# Quantile of the standard normal distribution at 0.975.
Z_95 = 1.959964


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
