"""Formats of numbers, dates and booleans in text: which ones fit all values of a column.

Shapes: N values.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.tasks import InvalidRecord
from train.tasks.columns.scalars import BOOLEAN_PAIRS, DIGITS_FORMATS, Boolean, Date, Number
from train.values.number_text import MISSING_WORDS, NumberFormat, find_format
from train.values.records import Columns, to_text

# Date formats other than ISO 8601. The first one that reads all dates of a column is used, or the
# first with the day in front if other columns of the file show that order.
DATE_FORMATS = (
    *("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d.%m.%y"),
    *("%m/%d/%Y", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p"),
    *("%d/%m/%Y", "%d/%m/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M:%S"),
    *("%m/%d/%y", "%d/%m/%y", "%m-%d-%Y", "%d-%m-%Y", "%d %b %Y", "%d-%b-%Y", "%d %B %Y"),
    *("%b %d, %Y", "%B %d, %Y", "%m/%d/%Y %I:%M %p", "%Y/%m/%d %H:%M", "%d-%b-%y", "%Y.%m.%d"),
    *("%d/%m/%Y %I:%M %p", "%d/%m/%Y %I:%M:%S %p", "%m/%d/%y %H:%M", "%d/%m/%y %H:%M"),
    *("%m-%d-%Y %H:%M", "%m-%d-%Y %H:%M:%S", "%d-%m-%Y %H:%M", "%d-%m-%Y %H:%M:%S"),
    *("%m/%d/%y %H:%M:%S", "%d/%m/%y %H:%M:%S", "%d.%m.%y %H:%M", "%d.%m.%y %H:%M:%S"),
    *("%d %b %Y %H:%M", "%d %b %Y %H:%M:%S", "%d-%b-%Y %H:%M:%S", "%d-%b-%y %H:%M:%S"),
    *("%b %d %Y %I:%M%p", "%b %d, %Y %H:%M", "%b %d, %Y %I:%M %p", "%y/%m/%d"),
    *("%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%d %H:%M:%S.%f UTC", "%Y-%m-%d %H:%M:%S GMT"),
    *("%d/%b/%Y:%H:%M:%S %z", "%a, %d %b %Y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"),
)
# Times of day. Two digits in each part tell them from ratios such as 4:3 and scores such as 5:16.
TIME = re.compile(r"\s*(\d\d:\d\d(:\d\d(\.\d+)?)?|\d{1,2}:\d\d(:\d\d)?\s*[AaPp][Mm])\s*")
TIME_FORMATS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M%p", "%I:%M:%S %p")
# `mostly_dates` tests this many texts, and a larger share than this must be dates.
LOOKED_AT, MOSTLY = 20, 0.7
# Numbers such as 20241231 are dates only if all years are in this range.
FIRST_YEAR, LAST_YEAR = 1800, 2099


@dataclass(frozen=True)
class FileStyle:
    """How a file writes ambiguous values; a field is None if the file gives no evidence.

    decimal: the decimal mark, "." or ",". day_first: whether 01/02 is the first of February.
    """

    decimal: str | None = None
    day_first: bool | None = None


UNKNOWN_STYLE = FileStyle()


def infer_style(columns: Columns) -> FileStyle:
    """Return the decimal mark and day order of a file, from its unambiguous columns."""
    marks, first = set(), set()
    for values in columns.values():
        texts = [value for value in values if isinstance(value, str) and is_word(value)]
        if not texts or not any(character.isdigit() for character in texts[0]):
            continue
        found, ambiguous = find_format(texts)
        # Without the decimal mark in a text there is no evidence: codes such as 16.125.148 read as
        # integers with points between thousands.
        if found and not ambiguous and any(found.decimal in text for text in texts):
            marks.add(found.decimal)
        dates = [each for each in fitting_dates(texts) if each in DATE_FORMATS]
        orders = {_order(each) for each in dates} if found is None else set()
        if len(orders) == 1:
            first |= {each == "%d" for each in orders if each in ("%d", "%m")}
    decimal = marks.pop() if len(marks) == 1 else None
    return FileStyle(decimal, first.pop() if len(first) == 1 else None)


def is_word(text: str) -> bool:
    """Return whether a text is neither blank nor a word for a missing value, such as NA."""
    return text.strip().lower() not in MISSING_WORDS


def _order(date_format: str) -> str:
    """Return which part comes first in a date format: "%d", "%m", "%y", and so on."""
    return date_format[:2].lower()


def other_orders(formats: Sequence[str]) -> list[str]:
    """Return the formats that start with another part than the first format does, one per part.

    Such formats read the same text as a different date.
    """
    found: dict[str, str] = {}
    for each in formats:
        found.setdefault(_order(each), each)
    return [each for each in found.values() if each != formats[0]]


def read_numbers(
    column: str, known: Sequence[Any], decimal: str | None
) -> tuple[np.ndarray | None, tuple[NumberFormat, bool]]:
    """Return a column's numbers, their format, and whether another format would also fit.

    The numbers are float64 [N], NaN where a value stands for a missing one; None if a value is not
    a number or none is finite. known: [N], the non-missing values. decimal: decides if both decimal
    marks fit.
    """
    texts = [value for value in known if isinstance(value, str)]
    found, ambiguous = NumberFormat(), False
    if texts:
        one, ambiguous = find_format(texts)
        if ambiguous and decimal:
            one, _ = find_format(texts, decimal)
        if one is None:
            return None, (found, False)
        found = one
    number = Number(column, found.decimal, found.unit, missing=())
    try:
        numbers_N = number.read(known)
    except InvalidRecord:
        return None, (found, False)
    return numbers_N if np.isfinite(numbers_N).any() else None, (found, ambiguous)


def fitting_dates(known: Sequence[Any]) -> list[str]:
    """Return the formats that read all values of a column as dates, or all as times of day."""
    are_times = all(isinstance(value, str) and TIME.fullmatch(value) for value in known)
    formats = TIME_FORMATS if are_times else DATE_FORMATS
    return [form for form in formats if read_all(Date("date", form), known) is not None]


def mostly_dates(texts: Sequence[str]) -> str | None:
    """Return the first text that is not a date if most others are, in one format; else None.

    Whether most are dates is tested on the first LOOKED_AT texts.
    """
    for form in (None, *DATE_FORMATS):
        date = Date("date", form)
        if sum(_is_date(date, text) for text in texts[:LOOKED_AT]) > LOOKED_AT * MOSTLY:
            return next((text for text in texts if not _is_date(date, text)), None)
    return None


def _is_date(date: Date, text: str) -> bool:
    return read_all(date, [text]) is not None


def digits_format(known: Sequence[Any], numbers_N: np.ndarray) -> str | None:
    """Return the format of integers that are dates, such as 20241231; None if they are not.

    known: the values as written. numbers_N: float64 [N], the same values as numbers.
    """
    for form, after_year in zip(DIGITS_FORMATS, (1e4, 1e10), strict=True):
        years_N = numbers_N // after_year
        if len(years_N) and years_N.min() >= FIRST_YEAR and years_N.max() <= LAST_YEAR:
            days_N = read_all(Date("date", form), known)
            return form if days_N is not None and len(np.unique(days_N)) > 2 else None
    return None


def read_all(kind: Number | Boolean | Date, known: Sequence[Any]) -> np.ndarray | None:
    """Return the finite values, float64 [M], M ≤ N; None if there are none or one is unreadable."""
    try:
        values_N = kind.read(known)
    except InvalidRecord:
        return None
    finite_N = values_N[np.isfinite(values_N)]
    return finite_N if len(finite_N) else None


def are_booleans(known: Sequence[Any]) -> bool:
    """Return whether all values are words for true and false, and not only the digits 0 and 1.

    For each word the opposite one must occur too: T and N, or F alone, may mean something else.
    """
    found = {to_text(value).strip().lower() for value in known if not isinstance(value, bytes)}
    pairs = [{true, false} for true, false in BOOLEAN_PAIRS if {true, false} <= found]
    return bool(pairs) and found == set().union(*pairs) and not found <= {"0", "1"}
