"""How a file writes its values: what reads all of a column's, and what is in doubt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.tasks import InvalidRecord
from train.tasks.columns.scalars import Boolean, Date, Number
from train.values.number_text import NumberFormat, find_format
from train.values.records import Columns, is_missing, to_text

# Other than ISO 8601. The first in which all dates of a column can be read is taken.
DATE_FORMATS = (
    *("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d.%m.%y"),
    *("%m/%d/%Y", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p"),
    *("%d/%m/%Y", "%d/%m/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M:%S"),
    *("%m/%d/%y", "%d/%m/%y", "%m-%d-%Y", "%d-%m-%Y", "%d %b %Y", "%d-%b-%Y", "%d %B %Y"),
    *("%b %d, %Y", "%B %d, %Y", "%m/%d/%Y %I:%M %p", "%Y/%m/%d %H:%M", "%d-%b-%y", "%Y.%m.%d"),
)
# Times of day. Unlike a ratio such as 4:3 they have two digits of minutes.
TIME = re.compile(r"\s*\d{1,2}:\d\d(:\d\d(\.\d+)?)?\s*([AaPp][Mm])?\s*")
TIME_FORMATS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M%p", "%I:%M:%S %p")
# Written as one number.
DIGITS_FORMAT, FIRST_DAY, LAST_DAY = "%Y%m%d", 19000101, 20991231


@dataclass(frozen=True)
class FileStyle:
    """How a file writes what can be read in two ways; None where nothing in it says.

    decimal: the mark of its numbers, "." or ",". day_first: whether 01/02 is the first of February.
    """

    decimal: str | None = None
    day_first: bool | None = None


UNKNOWN_STYLE = FileStyle()


def infer_style(columns: Columns) -> FileStyle:
    """Say how a file writes numbers and dates by those of its columns that leave no doubt."""
    marks, first = set(), set()
    for values in columns.values():
        texts = [value for value in values if isinstance(value, str) and not is_missing(value)]
        if not texts or not any(character.isdigit() for character in texts[0]):
            continue
        found, ambiguous = find_format(texts)
        if found and not ambiguous and any("," in text or "." in text for text in texts):
            marks.add(found.decimal)
        fitting = {each[:2] for each in fitting_dates(texts)} if found is None else set()
        if len(fitting) == 1:
            first |= {each == "%d" for each in fitting if each != "%Y"}
    decimal = marks.pop() if len(marks) == 1 else None
    return FileStyle(decimal, first.pop() if len(first) == 1 else None)


def read_numbers(
    column: str, known: Sequence[Any], decimal: str | None
) -> tuple[np.ndarray | None, tuple[NumberFormat, bool]]:
    """The numbers of a column, NaN where missing, and their format, with whether it is in doubt.

    None in place of the numbers where it holds others or none at all.
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
    """Return the formats in which all of a column's values are dates, or all are times of day."""
    are_times = all(isinstance(value, str) and TIME.fullmatch(value) for value in known)
    formats = TIME_FORMATS if are_times else DATE_FORMATS
    return [form for form in formats if read_all(Date("date", form), known) is not None]


def are_written_dates(known: Sequence[Any], numbers_N: np.ndarray) -> bool:
    """Whether whole numbers are dates such as 20241231."""
    if not (len(numbers_N) and numbers_N.min() >= FIRST_DAY and numbers_N.max() <= LAST_DAY):
        return False
    days_N = read_all(Date("date", DIGITS_FORMAT), known)
    return days_N is not None and len(np.unique(days_N)) > 2


def read_all(kind: Number | Boolean | Date, known: Sequence[Any]) -> np.ndarray | None:
    try:
        values_N = kind.read(known)
    except InvalidRecord:
        return None
    finite_N = values_N[np.isfinite(values_N)]
    return finite_N if len(finite_N) else None


def all_words(known: Sequence[Any], words: set[str]) -> bool:
    """Whether all are words of a set, and not all of them digits."""
    found = {to_text(value).strip().lower() for value in known if not isinstance(value, bytes)}
    return found <= words and not found <= {"0", "1"}
