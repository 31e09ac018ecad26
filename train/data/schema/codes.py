"""Detection of ids and codes: integers that are names, not quantities.

Shapes: N values, D distinct values, K target columns.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.stats import codes_beat_ranges
from train.values.number_text import PERCENT, SYMBOLS

# Largest share of distinct values in a category; a column with more identifies records.
MAX_DISTINCT_SHARE = 0.5
# Words of a column name (snake_case or camelCase), and last words that indicate codes.
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+")
CODE_WORDS = {
    *("id", "ids", "uid", "uuid", "guid", "code", "zip", "zipcode", "postcode", "postal", "plz"),
    *("sku", "isbn", "ean", "fips", "phone", "telephone", "ssn", "iban", "user", "customer"),
    *("client", "item", "product", "movie", "store", "shop", "merchant"),
}
# Words that, before a code word, indicate an amount, as in visits_per_user.
AMOUNT_WORDS = {"per", "by", "each", "num", "avg", "mean", "total", "count"}
# Words that indicate times, which are evenly spaced in regular measurements without being ids.
TIME_WORDS = {"time", "timestamp", "ts", "epoch", "date", "created", "updated", "at", "duration"}
AMOUNT_MARKS = set(SYMBOLS + PERCENT)
WHOLE_TEXT = re.compile(r"\s*[+-]?[0-9]+(\.0*)?\s*")
PADDED = re.compile(r"\s*0[0-9]+\s*")
COUNTER = "counts the records"
# float64 represents all integers up to this one exactly, but not all larger ones.
EXACT = 2.0**53
# In standard errors: numbers are codes if the target is predicted this much better from each value
# than from ranges of values.
MIN_GAIN = 4.0
# Nearly consecutive codes cover more than this share of the integers in their range.
MIN_DENSITY = 0.8
# With fewer distinct values, the piecewise encoding of numbers already separates them.
MIN_CODES = 20
# Asymptotic critical value, at 1 %, of the Kolmogorov-Smirnov statistic times sqrt(N).
KS_LIMIT = 1.63
# Largest average gap between consecutive ids.
MAX_GAP = 3
# With fewer values the test has too little power.
MIN_EVEN = 200


def why_codes(
    column: str, known: Sequence[Any], numbers_N: np.ndarray, targets_N: np.ndarray | None
) -> str | None:
    """Return the reason why a column's numbers are names, or None if they are quantities.

    known: the non-missing values as written. numbers_N: float64 [N], the same values as numbers.
    targets_N: the target as numbers [N] or [N, K], NaN if missing; None if unavailable.
    """
    if not np.all(numbers_N == np.round(numbers_N)):
        return None
    texts = [value for value in known if isinstance(value, str)]
    if any(not AMOUNT_MARKS.isdisjoint(text) for text in texts):
        return None
    distinct_D = np.unique(numbers_N)
    count, all_differ = len(numbers_N), len(distinct_D) == len(numbers_N) > 20
    if all_differ and np.all(np.diff(numbers_N) == 1):
        return COUNTER
    if np.median(np.abs(distinct_D)) > EXACT and all(map(_is_exact, known)):
        return "integers beyond 2^53, which are ids"
    if len(distinct_D) > 2 and names_codes(column):
        return "codes, judging by the column's name"
    if not all(map(WHOLE_TEXT.fullmatch, texts)):
        return None  # units or separators indicate an amount
    if all_differ and not _names_times(column) and _may_number_records(distinct_D):
        return "integers that all differ and are dense or evenly spread, which are ids"
    if not _may_be_codes(distinct_D):
        return None
    if targets_N is None or not MIN_CODES <= len(distinct_D) <= MAX_DISTINCT_SHARE * count:
        return None
    with_target_N = ~np.isnan(targets_N.reshape(count, -1)).any(axis=1)
    if codes_beat_ranges(numbers_N[with_target_N], targets_N[with_target_N]) > MIN_GAIN:
        return f"{len(distinct_D)} codes, which predict the target better than their order does"
    return None


def _is_exact(value: Any) -> bool:
    """Return whether a value is an integer written with all of its digits, unlike 6.02e23."""
    if isinstance(value, str):
        return WHOLE_TEXT.fullmatch(value) is not None
    return not isinstance(value, float | np.floating)


def _may_be_codes(sorted_D: np.ndarray) -> bool:
    """Return whether integers are nearly consecutive, or all have the same length of ≥ 4 digits."""
    low, high = sorted_D[0], sorted_D[-1]
    dense = len(sorted_D) > MIN_DENSITY * (high - low + 1)
    return bool(dense or (low >= 1000 and len(f"{low:.0f}") == len(f"{high:.0f}")))


def _names_times(column: str) -> bool:
    return not TIME_WORDS.isdisjoint(word.lower() for word in WORDS.findall(column))


def names_codes(column: str) -> bool:
    """Return whether a column's name indicates ids or codes."""
    words = [word.lower() for word in WORDS.findall(column)]
    if len(words) > 1 and words[-2] in AMOUNT_WORDS:
        return False
    return bool(words) and (words[-1] in CODE_WORDS or words[0] == "id")


def _may_number_records(sorted_N: np.ndarray) -> bool:
    """Return whether integers that all differ are more likely ids than amounts.

    Many amounts are rarely spread evenly. Evenness cannot be tested on few values, so these count
    as ids only if the average gap between them is small.
    """
    if sorted_N[-1] - sorted_N[0] < MAX_GAP * len(sorted_N):
        return True
    return len(sorted_N) >= MIN_EVEN and _is_even(sorted_N)


def _is_even(sorted_N: np.ndarray) -> bool:
    """Return whether a Kolmogorov-Smirnov test does not reject a uniform distribution."""
    places_N = (sorted_N - sorted_N[0]) / (sorted_N[-1] - sorted_N[0])
    count = len(places_N)
    largest = np.abs(places_N - (np.arange(count) + 0.5) / count).max() + 0.5 / count
    return bool(largest * math.sqrt(count) < KS_LIMIT)
