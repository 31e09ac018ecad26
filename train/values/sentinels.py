"""Detection of numbers that stand for a missing value, and statistics robust to outliers.

Shapes: N values, all finite, D distinct values.
"""

import re

import numpy as np

# A sentinel occurs at least this often, and in at least this share of the values.
MIN_REPEATS, MIN_SHARE = 3, 0.001
# Least distance of a sentinel from all other values, in widths of their central 98 % range: for
# numbers of the form USUAL, and for any other number.
FAR, VERY_FAR = 1.0, 10.0
MOST_SENTINELS = 4
USUAL = re.compile(r"-?(9{2,}|1e[0-9]+|10{4,}|2147483647|2147483648|9223372036854775807)")
# With fewer distinct values than this, only NINES and values beyond ±1e30 can be sentinels: in
# doses of 5, 10 and 100, the 100 is not one.
FEW = 10
NINES = re.compile(r"-?9{2,}")
# Values further than this many interquartile ranges beyond the quartiles are clipped to there.
BEYOND_QUARTILES = 30.0
# Larger values are clipped, because the sum of their squares could overflow.
LARGEST = 1e140


def find_sentinels(values_N: np.ndarray) -> tuple[float, ...]:
    """Return the values that stand for a missing one, such as -999.

    They are repeated and far from all others. values_N: numbers [N], all finite.
    """
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
    """Return mean and standard deviation after clipping extreme outliers, see BEYOND_QUARTILES.

    values_N: numbers [N], all finite. Returns (0, 1) for no values, and a deviation of 1 if all
    values are equal.
    """
    if not len(values_N):
        return 0.0, 1.0
    values_N = np.clip(values_N, -LARGEST, LARGEST)
    low, high = np.quantile(values_N, (0.25, 0.75))
    if low == high:  # most values are equal, so use the spread of the distinct values
        low, high = np.quantile(np.unique(values_N), (0.25, 0.75))
    reach = BEYOND_QUARTILES * (high - low)
    values_N = np.clip(values_N, low - reach, high + reach)
    mean = values_N.mean()
    scale = np.sqrt(np.mean((values_N - mean) ** 2))
    return float(mean), float(scale) if scale > 0 else 1.0


def _is_usual(value: float, *, few: bool) -> bool:
    """Return whether a number is commonly written for a missing value."""
    if abs(value) > 1e30:
        return True
    known = NINES if few else USUAL
    return value == round(value) and known.fullmatch(f"{value:.0f}") is not None
