"""Several labels in one value: a list of names, or a text with separators.

Shapes: N values.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.values.names import to_name
from train.values.number_text import share_of_numbers
from train.values.records import is_missing

# Separator of labels in predictions; always accepted in input texts too.
SEPARATOR = "|"
# Separators that are detected, if more than this share of the texts contains one.
SEPARATORS, MIN_SHARE = "|;,", 0.05
# Items in single or double quotes, as pandas writes a column of lists: ['red', 'blue', None].
_ITEM = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None|nan"
ITEMS = re.compile(_ITEM)
LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})\s*(?:,\s*|(?=\])))*\]")
ESCAPED = re.compile(r"\\(.)")
SPACES = {"n": "\n", "t": "\t", "r": "\r"}
# If a larger share of texts is numbers, as in 1,5 and 2 with some n/a, they are not label lists.
MOST_NUMBERS = 0.5


def find_separator(values: Sequence[Any] | np.ndarray) -> str | None:
    """Return the separator of the labels in texts [N], None if there is none.

    values: [N]; values that are not texts are ignored.
    """
    texts = [value for value in values if isinstance(value, str)]
    for separator in SEPARATORS:
        if sum(separator in text for text in texts) > MIN_SHARE * len(texts):
            return separator
    return None


def split_labels(value: Any, separator: str) -> list[str]:
    """Return the labels of a list or text; an empty list if the value is missing.

    Raises ValueError if an item is not a name, see `to_name`.
    """
    if isinstance(value, list | tuple | np.ndarray):
        return [to_name(item, "text") for item in value]
    if is_missing(value):
        return []
    words = to_name(value, "text")
    if words.startswith("["):
        try:
            return [to_name(item, "text") for item in json.loads(words)]
        except json.JSONDecodeError:
            if (names := read_name_list(words)) is not None:
                return [to_name(name, "text") for name in names]
    parts = words.replace(separator, SEPARATOR).split(SEPARATOR)
    return [part.strip() for part in parts if part.strip()]


def read_name_list(text: str) -> list[str] | None:
    """Return the names in the repr of a Python list of strings, without None and nan.

    None if the text has another form.
    """
    if LIST.fullmatch(text.strip()) is None:
        return None
    return [
        ESCAPED.sub(lambda found: SPACES.get(found[1], found[1]), item[1:-1])
        for item in ITEMS.findall(text)
        if item[0] in "'\""
    ]


def read_lists(values: Sequence[Any]) -> list[list[Any]] | None:
    """Return lists of numbers or of names from texts; None if a value is not such a text."""
    if not all(isinstance(value, str) and value.strip().startswith("[") for value in values):
        return None
    try:
        lists = [json.loads(value) for value in values]
    except json.JSONDecodeError:
        lists = [read_name_list(value) for value in values]
        if None in lists:
            return None
    kinds = {type(item) for each in lists for item in each} - {type(None)}
    return lists if kinds and (kinds <= {int, float} or kinds == {str}) else None


def are_label_lists(values: Sequence[Any], most_labels: int) -> bool:
    """Return whether texts hold several labels each: few labels in many combinations.

    The combinations must differ in length, and some label must also occur alone.
    """
    if not all(isinstance(value, str) for value in values):
        return False
    separator = find_separator(values)
    if separator is None or (separator == "," and share_of_numbers(values)[0] > MOST_NUMBERS):
        return False
    try:
        lists = [split_labels(value, separator) for value in set(values)]
    except ValueError:  # JSON lists whose items are not names
        return False
    labels = {label for each in lists for label in each}
    alone = {each[0] for each in lists if len(each) == 1}
    return bool(
        len({len(each) for each in lists}) > 1
        and len(labels) < len(lists)
        and len(labels) <= most_labels
        and alone & {label for each in lists if len(each) > 1 for label in each}
    )
