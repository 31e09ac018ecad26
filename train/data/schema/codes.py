"""Codes: whole numbers that are names, which a net must not take for amounts."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.stats import codes_beat_ranges
from train.values.number_text import PERCENT, SYMBOLS

# Largest share of different values in a category; with more, a column identifies records.
MAX_DISTINCT_SHARE = 0.5
# Words of a name, and those at whose end it names codes.
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+")
CODE_WORDS = {
    *("id", "ids", "uid", "uuid", "guid", "code", "zip", "zipcode", "postcode", "postal", "plz"),
    *("sku", "isbn", "ean", "fips", "phone", "telephone", "ssn", "iban", "user", "customer"),
    *("client", "item", "product", "movie", "store", "shop", "merchant"),
}
# Before one of them they name an amount, as in visits_per_user.
AMOUNT_WORDS = {"per", "by", "each", "num", "avg", "mean", "total", "count"}
# Words in names of columns that hold times, which are evenly spaced where something is measured.
TIME_WORDS = {"time", "timestamp", "ts", "epoch", "date", "created", "updated", "at", "duration"}
AMOUNT_MARKS = set(SYMBOLS + PERCENT)
WHOLE_TEXT = re.compile(r"\s*[+-]?[0-9]+(\.0*)?\s*")
PADDED = re.compile(r"\s*0[0-9]+\s*")
COUNTER = "counts the records"
# Larger whole numbers are not all different as floating-point ones.
EXACT = 2.0**53
# In standard errors: what is predicted better by each number than by the range it is in, is a code.
MIN_GAIN = 4.0
# Least share of the numbers between the smallest and the largest that codes use.
MIN_DENSITY = 0.8
# Fewer different numbers are told apart by a number's pieces.
MIN_CODES = 20
# Critical value at 1 % of the Kolmogorov-Smirnov statistic times the root of the count.
KS_LIMIT = 1.63
# Of ids, on average from one to the next.
MAX_GAP = 3
# Of fewer numbers the test finds next to nothing uneven.
MIN_EVEN = 200


def why_codes(
    column: str, known: Sequence[Any], numbers_N: np.ndarray, targets_N: np.ndarray | None
) -> str | None:
    """Why whole numbers are names rather than numbers, or None where they are numbers."""
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
        return "whole numbers beyond 2^53, which are ids"
    if len(distinct_D) > 2 and names_codes(column):
        return "codes, by the column's name"
    if not all(map(WHOLE_TEXT.fullmatch, texts)):
        return None  # an amount, as it has a unit or separators
    if all_differ and not _names_times(column) and _may_number_records(distinct_D):
        return "whole numbers that all differ and lie evenly, which are ids"
    if not _may_be_codes(distinct_D):
        return None
    if targets_N is None or not MIN_CODES <= len(distinct_D) <= MAX_DISTINCT_SHARE * count:
        return None
    with_target_N = ~np.isnan(targets_N.reshape(count, -1)).any(axis=1)
    if codes_beat_ranges(numbers_N[with_target_N], targets_N[with_target_N]) > MIN_GAIN:
        return f"{len(distinct_D)} codes, which tell more than their order"
    return None


def _is_exact(value: Any) -> bool:
    """Whether a value is a whole number with all of its digits, unlike 6.02e23."""
    if isinstance(value, str):
        return WHOLE_TEXT.fullmatch(value) is not None
    return not isinstance(value, float | np.floating)


def _may_be_codes(sorted_D: np.ndarray) -> bool:
    """Whether whole numbers are numbered through, or all have as many digits, as codes do."""
    low, high = sorted_D[0], sorted_D[-1]
    dense = len(sorted_D) > MIN_DENSITY * (high - low + 1)
    return bool(dense or (low >= 1000 and len(f"{low:.0f}") == len(f"{high:.0f}")))


def _names_times(column: str) -> bool:
    return not TIME_WORDS.isdisjoint(word.lower() for word in WORDS.findall(column))


def names_codes(column: str) -> bool:
    """Whether a column's name says that its values are ids or codes."""
    words = [word.lower() for word in WORDS.findall(column)]
    if len(words) > 1 and words[-2] in AMOUNT_WORDS:
        return False
    return bool(words) and (words[-1] in CODE_WORDS or words[0] == "id")


def _may_number_records(sorted_N: np.ndarray) -> bool:
    """Whether whole numbers that all differ are more likely ids than amounts.

    Amounts of many records are rarely spread evenly. Of few records that cannot be told; ids then
    have gaps of a few numbers only.
    """
    if sorted_N[-1] - sorted_N[0] < MAX_GAP * len(sorted_N):
        return True
    return len(sorted_N) >= MIN_EVEN and _is_even(sorted_N)


def _is_even(sorted_N: np.ndarray) -> bool:
    """Whether numbers may be spread evenly over their range, by a Kolmogorov-Smirnov test."""
    places_N = (sorted_N - sorted_N[0]) / (sorted_N[-1] - sorted_N[0])
    count = len(places_N)
    largest = np.abs(places_N - (np.arange(count) + 0.5) / count).max() + 0.5 / count
    return bool(largest * math.sqrt(count) < KS_LIMIT)
