"""Several labels in one value: a list of names, or a text with a separator between them."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.values.names import to_name
from train.values.records import is_missing

# What predictions have between labels. It is read in every text.
SEPARATOR = "|"
# What else may stand between labels in a text, and in what share of the texts at least.
SEPARATORS, MIN_SHARE = "|;,", 0.05
# Names in quotes of either kind, as pandas writes a column of lists: ['red', 'blue'].
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
QUOTED_LIST = re.compile(rf"\[\s*(?:(?:{_QUOTED})\s*(?:,\s*|(?=\])))*\]")
QUOTED_NAME = re.compile(_QUOTED)


def find_separator(values: Sequence[Any] | np.ndarray) -> str | None:
    """Return what stands between the labels of texts, None where nothing does."""
    texts = [value for value in values if isinstance(value, str)]
    for separator in SEPARATORS:
        if sum(separator in text for text in texts) > MIN_SHARE * len(texts):
            return separator
    return None


def split_labels(value: Any, separator: str) -> list[str]:
    """Return the labels of a value; none where it is missing.

    Raises ValueError for what is no name.
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
            if QUOTED_LIST.fullmatch(words):
                names = (name[1:-1] for name in QUOTED_NAME.findall(words))
                return [re.sub(r"\\(.)", r"\1", name) for name in names]
    parts = words.replace(separator, SEPARATOR).split(SEPARATOR)
    return [part.strip() for part in parts if part.strip()]


def are_label_lists(values: Sequence[Any], most_labels: int) -> bool:
    """Whether texts are several labels each: few of them, in many combinations of any length."""
    if not all(isinstance(value, str) for value in values):
        return False
    separator = find_separator(values)
    if separator is None:
        return False
    try:
        lists = [split_labels(value, separator) for value in set(values)]
    except ValueError:  # JSON lists of what is no name
        return False
    labels = {label for each in lists for label in each}
    alone = {each[0] for each in lists if len(each) == 1}
    return bool(
        len({len(each) for each in lists}) > 1
        and len(labels) < len(lists)
        and len(labels) <= most_labels
        and alone & {label for each in lists if len(each) > 1 for label in each}
    )
