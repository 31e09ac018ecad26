"""Names of classes and categories: the same value has the same name in every file and request.

The form of names is decided for a whole column, because a single value does not show whether "1.0"
is the number 1 or the name of a version.
"""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from train.values.records import is_missing

# How a column's values become names: "number" writes plain numbers in their shortest form,
# "boolean" writes true and false in lower case, and "text" keeps values as they are written.
NameForm = Literal["number", "boolean", "text"]

PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
TRUTHS = {"true", "false"}


def find_form(values: Iterable[Any]) -> NameForm:
    """Return the form of a column's names, from all of its non-missing values.

    Numbers with leading zeros, such as postal codes, are text.
    """
    numbers = truths = True
    for value in values:
        if is_missing(value):
            continue
        name = to_name(value, "text")
        numbers = numbers and PLAIN_NUMBER.fullmatch(name) is not None
        truths = truths and name.lower() in TRUTHS
        if not (numbers or truths):
            return "text"
    return "number" if numbers else "boolean"


def to_name(value: Any, form: NameForm) -> str:
    """Return a value as a name, stripped and in Unicode's composed form (NFC).

    Raises ValueError if the value is a list, array or object, or bytes that are not UTF-8.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
    if isinstance(value, str):
        name = value.strip()
        if not name.isascii():
            name = unicodedata.normalize("NFC", name)
    elif isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    elif isinstance(value, dict | list | tuple | np.ndarray):
        raise ValueError("is not a name")
    else:
        name = _number_name(value)
    if form == "number" and PLAIN_NUMBER.fullmatch(name):
        return shortest(name)
    return name.lower() if form == "boolean" and name.lower() in TRUTHS else name


def shortest(number: str) -> str:
    """Return a plain number in its shortest form: 1.50 becomes 1.5, and 1.0 and 1e0 become 1."""
    if "e" in number or "E" in number:
        number = f"{Decimal(number):f}"
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number


def _number_name(value: Any) -> str:
    if isinstance(value, Decimal):
        return shortest(f"{value:f}")
    if isinstance(value, float | np.floating) and np.isfinite(value):
        # The fewest digits that identify the value among floats of its type.
        return shortest(str(np.format_float_positional(value, trim="-")))
    return str(value)
