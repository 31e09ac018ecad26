"""Numbers that stand for a missing value, and statistics that a few wrong values do not move.

Shapes: N values, all finite.
"""

import re

import numpy as np

# A value that stands for "missing" is repeated.
MIN_REPEATS, MIN_SHARE = 3, 0.001
# How far it is from all others, in the width of the range that holds 98 % of them: a number that
# is often used so, and any other.
FAR, VERY_FAR = 1.0, 10.0
MOST_SENTINELS = 4
USUAL = re.compile(r"-?(9{2,}|1e[0-9]+|10{4,}|2147483647|2147483648|9223372036854775807)")
# Of fewer different values, such as doses of 5, 10 and 100, it must be one of these.
FEW = 10
NINES = re.compile(r"-?9{2,}")
# Beyond so many interquartile ranges a value counts as if it lay there.
BEYOND_QUARTILES = 30.0
# Larger values count as this one: their squares could not be added up.
LARGEST = 1e140


def find_sentinels(values_N: np.ndarray) -> tuple[float, ...]:
    """Return the values that stand for a missing one, such as -999: repeated, and far from all
    others."""
    found: list[float] = []
    distinct_D, counts_D = np.unique(values_N, return_counts=True)
    least = max(MIN_REPEATS, MIN_SHARE * len(values_N))
    while len(found) < MOST_SENTINELS and len(distinct_D) > 2:
        for end, beside in ((0, 1), (-1, -2)):
            value = distinct_D[end]
            others_D = np.delete(distinct_D, end)
            repeated_N = np.repeat(others_D, np.delete(counts_D, end))
            low, high = np.quantile(repeated_N, (0.01, 0.99))
            width = (high - low) or (others_D[-1] - others_D[0])
            gap = abs(value - distinct_D[beside])
            usual = _is_usual(value, few=len(distinct_D) < FEW)
            may_be = usual or len(distinct_D) >= FEW
            if may_be and counts_D[end] >= least and gap > width * (FAR if usual else VERY_FAR):
                found.append(float(value))
                distinct_D, counts_D = others_D, np.delete(counts_D, end)
                break
        else:
            break
    return tuple(found)


def robust_mean_scale(values_N: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation, without the weight of values that are absurdly far.

    Those beyond BEYOND_QUARTILES interquartile ranges of the quartiles count as if they lay there.
    0 and 1 where there are no values, and a deviation of 1 where all are the same.
    """
    if not len(values_N):
        return 0.0, 1.0
    values_N = np.clip(values_N, -LARGEST, LARGEST)
    low, high = np.quantile(values_N, (0.25, 0.75))
    if low == high:  # most are the same: how the others are spread is what counts
        low, high = np.quantile(np.unique(values_N), (0.25, 0.75))
    reach = BEYOND_QUARTILES * (high - low)
    values_N = np.clip(values_N, low - reach, high + reach)
    mean = values_N.mean()
    scale = np.sqrt(np.mean((values_N - mean) ** 2))
    return float(mean), float(scale) if scale > 0 else 1.0


def _is_usual(value: float, *, few: bool) -> bool:
    """Whether a number is one that programs and people write for a missing one."""
    if abs(value) > 1e30:
        return True
    known = NINES if few else USUAL
    return value == round(value) and known.fullmatch(f"{value:.0f}") is not None
