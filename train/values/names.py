"""Names of classes and categories: one for each value, whatever file, format or request it is in.

The type of a whole column decides, as one value does not say whether "1.0" is the number 1 or the
name of a version.
"""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from train.values.records import is_missing

# How the values of a column become names: plain numbers in their shortest form, booleans as true
# and false, all else as it is written.
NameForm = Literal["number", "boolean", "text"]

PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
TRUTHS = {"true", "false"}


def find_form(values: Iterable[Any]) -> NameForm:
    """Return the form of a column's names by all of its values, those that are missing aside.

    Numbers with zeros before them, such as postal codes, are text.
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
    """Return a value as a name, without spaces at its ends and in Unicode's composed form (NFC).

    Raises ValueError for bytes that are not UTF-8 and for what is no single value.
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
        raise ValueError("is no name")
    else:
        name = _number_name(value)
    if form == "number" and PLAIN_NUMBER.fullmatch(name):
        return shortest(name)
    return name.lower() if form == "boolean" and name.lower() in TRUTHS else name


def shortest(number: str) -> str:
    """Return a plain number without zeros that say nothing: 1.50 is 1.5, and 1.0 and 1e0 are 1."""
    if "e" in number or "E" in number:
        number = f"{Decimal(number):f}"
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number


def _number_name(value: Any) -> str:
    if isinstance(value, Decimal):
        return shortest(f"{value:f}")
    if isinstance(value, float | np.floating) and np.isfinite(value):
        # The fewest digits that tell it from other numbers of as many bits.
        return shortest(str(np.format_float_positional(value, trim="-")))
    return str(value)
