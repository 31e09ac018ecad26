"""How a file writes its values: what reads all of a column's, and what is in doubt."""

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
    return numbers_N if np.isfinite(numbers_N).any() else None, (found, ambiguous and not decimal)


def fitting_dates(known: Sequence[Any]) -> list[str]:
    return [form for form in DATE_FORMATS if read_all(Date("date", form), known) is not None]


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
