"""Inference of columns: the kind of each column, from its values.

Shapes: N records, K target columns.
"""

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

# Names that pandas gives to the column of a frame's index.
INDEX_NAMES = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
IP_ADDRESS = re.compile(r"\s*\d{1,3}(\.\d{1,3}){3}\s*")
# Average number of words per value from which a column is text.
TEXT_WORDS = 3.0
# A column with one value and missing ones is a flag if both make up at least this share.
MIN_FLAGGED = 0.01
# Share of zero-padded numbers above which a column of varying lengths holds codes.
MIN_PADDED = 0.02
# If at least this share of a category's values are numbers, the reason names one that is not.
MOSTLY_NUMBERS = 0.8
MIXED_UNITS = "all are numbers, but only some have a unit or letter"


@dataclass(frozen=True)
class InferredColumn:
    """The kind of a column, None if the column is not used, and the reason for the decision.

    options: further options of the column in the config, such as a date's format.
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
    """Return the kind of a column, inferred from its name and values.

    values: [N], as read from the source. targets_N: the target as numbers [N] or [N, K], to tell
    codes from quantities.
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
        return InferredColumn(column, None, f"{type(first).__name__} values are not supported")
    distinct = len({to_text(value).strip() for value in known})
    if INDEX_NAMES.fullmatch(column) and distinct == len(known):
        return InferredColumn(column, None, "a pandas index")
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
        return InferredColumn(column, "set", f"labels separated by '{find_separator(known)}'")
    names = _names(column, known, distinct)
    texts = [value for value in known if isinstance(value, str)]
    share, other = share_of_numbers(texts) if texts else (0.0, "")
    if share >= MOSTLY_NUMBERS:
        count = round((1 - share) * len(texts))
        numbers = f"all but {count:,} of {len(texts):,} are numbers; {shorten(other)} is not one"
        what = numbers if other else MIXED_UNITS
        return replace(names, why=f"{names.why}; {what}")
    if no_date := mostly_dates([text for text in texts if is_word(text)]):
        return replace(names, why=f"{names.why}; most are dates, but {shorten(no_date)} is not one")
    return names


def _lists(column: str, known: Sequence[Any]) -> InferredColumn:
    items = [item for value in known for item in value if item is not None]
    if all(isinstance(item, str) for item in items) and items:
        return InferredColumn(column, "set", f"lists of {len(set(items))} different texts")
    lengths = {len(value) for value in known}
    if not all(isinstance(item, int | float | np.number) for item in items):
        return InferredColumn(column, None, "lists of items other than numbers or texts")
    if not items:
        return InferredColumn(column, None, "empty lists in all records")
    if len(lengths) > 1:
        why = f"lists of {min(lengths)} to {max(lengths)} numbers; vectors need one length"
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
        why += " where given; values without it are read as the same unit"
    if in_doubt and file_style.decimal == ",":
        why += (
            f"; if its points are decimal, set features: {{{column}: {{kind: number, decimal: .}}}}"
        )
    elif in_doubt and not file_style.decimal:
        why += "; if its decimal mark is a comma, give --data.decimal ,"
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
    why = f"{chosen}; {' and '.join(others)} would also fit" if others else chosen
    return InferredColumn(column, "date", why, {"format": chosen})


def _names(
    column: str, known: Sequence[Any], distinct: int, why: str | None = None
) -> InferredColumn:
    """Return the kind of a column of names: category, text, or None if it identifies records."""
    words = float(np.mean([len(to_text(value).split()) for value in known]))
    if not any(character.isalpha() for value in known for character in to_text(value)):
        words = 1.0  # not words but, for example, phone numbers
    if words >= TEXT_WORDS and distinct > 0.1 * len(known):
        return InferredColumn(column, "text", f"{words:.0f} words on average")
    if distinct > max(MAX_DISTINCT_SHARE * len(known), 20):
        if words > 1.5:
            return InferredColumn(column, "text", f"{distinct} different texts")
        what = f"{why}; " if why else ""
        return InferredColumn(column, None, f"{what}{distinct} different names of {len(known)}")
    return InferredColumn(column, "category", why or f"{distinct} different names")


def _looks_padded(known: Sequence[Any]) -> bool:
    """Return whether values are zero-padded digits, such as postal codes.

    One padded value is enough if all values have the same length; otherwise MIN_PADDED of them.
    """
    texts = [value.strip() for value in known if isinstance(value, str)]
    num_padded = sum(PADDED.fullmatch(text) is not None for text in texts)
    alike = len({len(text) for text in texts}) == 1
    return num_padded > (0 if alike else MIN_PADDED * len(texts))
