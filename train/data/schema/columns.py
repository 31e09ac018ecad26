"""Inference of columns: what each one is, found by looking at its values."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from train.data.schema.codes import (
    COUNTER,
    MAX_DISTINCT_SHARE,
    PADDED,
    names_codes,
    why_codes,
)
from train.data.schema.styles import (
    UNKNOWN_STYLE,
    FileStyle,
    are_booleans,
    digits_format,
    fitting_dates,
    is_word,
    mostly_dates,
    other_orders,
    read_all,
    read_numbers,
)
from train.tasks.columns.lists import MAX_LABELS
from train.tasks.columns.scalars import Date
from train.values.label_lists import are_label_lists, find_separator, read_lists
from train.values.number_text import NumberFormat, share_of_numbers
from train.values.pictures import has_signature, is_data_uri
from train.values.records import is_file, is_missing, shorten, to_text

# How a column is called that pandas makes of a frame's index.
INDEX_NAMES = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
IP_ADDRESS = re.compile(r"\s*\d{1,3}(\.\d{1,3}){3}\s*")
TEXT_WORDS = 3.0
# Least share of records in which a flag is set, and not set, where the other value is missing.
MIN_FLAGGED = 0.01
# Least share of numbers with a 0 before them where they are of several lengths.
MIN_PADDED = 0.02
# Share of numbers from which the report names a value that is not a number.
MOSTLY_NUMBERS = 0.8
MIXED_UNITS = "all are numbers, some with a unit or letter and some without"


@dataclass(frozen=True)
class InferredColumn:
    """What a column is, or None where it is left out, and why.

    options: of the column in the config, besides its kind.
    """

    column: str
    kind: str | None
    why: str
    options: dict[str, Any] = field(default_factory=dict)


def infer_column(
    column: str,
    values: Sequence[Any] | np.ndarray,
    *,
    style: FileStyle = UNKNOWN_STYLE,
    targets_N: np.ndarray | None = None,
) -> InferredColumn:
    """Say what a column is by its values.

    targets_N: the target as numbers [N] or [N, K], by which codes are told from numbers.
    """
    known_N = np.array([not is_missing(value) for value in values], bool)
    known = [value for value, is_known in zip(values, known_N, strict=True) if is_known]
    if not known:
        return InferredColumn(column, None, f"missing in all of {len(values)} records")
    first = known[0]
    if is_file(first):
        return InferredColumn(column, "image", "image files")
    if (isinstance(first, bytes) and has_signature(first)) or is_data_uri(first):
        return InferredColumn(column, "image", "image files")
    if isinstance(first, list | tuple | np.ndarray):
        return _lists(column, known)
    if (lists := read_lists(known)) is not None:
        return _lists(column, lists)
    if isinstance(first, dict | bytes):
        return InferredColumn(column, None, f"{type(first).__name__} values are of no known kind")
    distinct = len({to_text(value).strip() for value in known})
    if INDEX_NAMES.fullmatch(column) and distinct == len(known):
        return InferredColumn(column, None, "an index of pandas")
    is_boolean = isinstance(first, bool | np.bool_)
    if distinct == 1:
        share = known_N.mean()
        if MIN_FLAGGED <= share <= 1 - MIN_FLAGGED:
            flag = f"'{to_text(first).strip()}' or missing ({1 - share:.0%} of the records)"
            return InferredColumn(column, "boolean" if is_boolean else "category", flag)
        missing = f"; missing in {len(values) - len(known)}" if len(known) < len(values) else ""
        what = f"the same in all of {len(known)} records{missing}"
        return InferredColumn(column, None, what)
    if is_boolean or are_booleans(known):
        return InferredColumn(column, "boolean", "true and false")
    if _looks_padded(known):
        return _names(column, known, distinct, "codes that begin with 0")
    if all(isinstance(value, str) and IP_ADDRESS.fullmatch(value) for value in known):
        return _names(column, known, distinct, "IP addresses")
    numbers_N, found = read_numbers(column, known, style.decimal)
    if numbers_N is not None:
        finite_N = np.isfinite(numbers_N)
        finite = [value for value, is_finite in zip(known, finite_N, strict=True) if is_finite]
        form = digits_format(finite, numbers_N[finite_N])
        if form and not names_codes(column):
            return InferredColumn(column, "date", form, {"format": form})
        why = why_codes(
            column,
            finite,
            numbers_N[finite_N],
            None if targets_N is None else targets_N[known_N][finite_N],
        )
        if why == COUNTER:
            return InferredColumn(column, None, why)
        if why:
            return _names(column, known, distinct, why)
        return _number(column, finite, numbers_N[finite_N], found, style)
    date = _date(column, known, style)
    if date is not None:
        return date
    if are_label_lists(known, MAX_LABELS):
        return InferredColumn(column, "set", f"labels with '{find_separator(known)}' between them")
    names = _names(column, known, distinct)
    texts = [value for value in known if isinstance(value, str)]
    share, other = share_of_numbers(texts) if texts else (0.0, "")
    if share >= MOSTLY_NUMBERS:
        count = round((1 - share) * len(texts))
        numbers = f"all but {count:,} of {len(texts):,} are numbers; {shorten(other)} is not"
        what = numbers if other else MIXED_UNITS
        return replace(names, why=f"{names.why}; {what}")
    if no_date := mostly_dates([text for text in texts if is_word(text)]):
        return replace(names, why=f"{names.why}; most are dates, {shorten(no_date)} is none")
    return names


def _lists(column: str, known: Sequence[Any]) -> InferredColumn:
    items = [item for value in known for item in value if item is not None]
    if all(isinstance(item, str) for item in items) and items:
        return InferredColumn(column, "set", f"lists of {len(set(items))} different texts")
    lengths = {len(value) for value in known}
    if not all(isinstance(item, int | float | np.number) for item in items):
        return InferredColumn(column, None, "lists of what is neither numbers nor texts")
    if not items:
        return InferredColumn(column, None, "empty lists in all records")
    if len(lengths) > 1:
        why = f"lists of {min(lengths)} to {max(lengths)} numbers; a vector has one length"
        return InferredColumn(column, None, why)
    return InferredColumn(column, "vector", f"lists of {lengths.pop()} numbers")


def _number(
    column: str,
    known: Sequence[Any],
    numbers: np.ndarray,
    found: tuple[NumberFormat, bool],
    file_style: FileStyle,
) -> InferredColumn:
    style, in_doubt = found
    has_unit_everywhere = all(style.unit in value for value in known if isinstance(value, str))
    why = f"{numbers.min():g} to {numbers.max():g}"
    options: dict[str, Any] = {}
    if style.decimal != ".":
        why = f"{why}, with a decimal comma"
    if style.decimal != "." or file_style.decimal == ",":
        options["decimal"] = style.decimal
    if style.unit:
        options["unit"], why = style.unit, f"{why}, in {style.unit}"
    if style.unit and not has_unit_everywhere:
        why += " where that stands, and the others alike"
    if in_doubt and file_style.decimal == ",":
        why += f"; features: {{{column}: {{kind: number, decimal: .}}}} reads points as decimal"
    elif in_doubt and not file_style.decimal:
        why += "; if its commas and points are the other way round, give --data.decimal ,"
    return InferredColumn(column, "number", why, options)


def _date(column: str, known: Sequence[Any], style: FileStyle) -> InferredColumn | None:
    if read_all(Date(column), known) is not None:
        return InferredColumn(column, "date", "ISO 8601")
    fitting = fitting_dates(known)
    if not fitting:
        return None
    if style.day_first:
        fitting.sort(key=lambda each: not each.startswith("%d"))
    chosen, others = fitting[0], other_orders(fitting)
    why = f"{chosen}; {' and '.join(others)} fits as well" if others else chosen
    return InferredColumn(column, "date", why, {"format": chosen})


def _names(
    column: str, known: Sequence[Any], distinct: int, why: str | None = None
) -> InferredColumn:
    """What a column of names is: a category, text, or left out as it names records."""
    words = float(np.mean([len(to_text(value).split()) for value in known]))
    if not any(character.isalpha() for value in known for character in to_text(value)):
        words = 1.0  # such as phone numbers
    if words >= TEXT_WORDS and distinct > 0.1 * len(known):
        return InferredColumn(column, "text", f"{words:.0f} words on average")
    if distinct > max(MAX_DISTINCT_SHARE * len(known), 20):
        if words > 1.5:
            return InferredColumn(column, "text", f"{distinct} different texts")
        what = f"{why}; " if why else ""
        return InferredColumn(column, None, f"{what}{distinct} different names of {len(known)}")
    return InferredColumn(column, "category", why or f"{distinct} different names")


def _looks_padded(known: Sequence[Any]) -> bool:
    """Whether digits begin with a 0 that a number would lose, as postal codes do; not a single one
    among numbers of all lengths."""
    texts = [value.strip() for value in known if isinstance(value, str)]
    num_padded = sum(PADDED.fullmatch(text) is not None for text in texts)
    alike = len({len(text) for text in texts}) == 1
    return num_padded > (0 if alike else MIN_PADDED * len(texts))
