"""Inference of the task type from the values of the target."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.errors import UserError
from train.data.schema.codes import MAX_DISTINCT_SHARE
from train.data.schema.styles import are_booleans, read_numbers
from train.values.label_lists import are_label_lists, find_separator, read_lists
from train.values.names import to_name
from train.values.records import is_missing, shorten

MAX_CLASSES, MAX_NAMED_CLASSES = 100, 1000


def infer_task_type(
    values: Sequence[Any] | np.ndarray, decimal: str | None = None
) -> tuple[str, str]:
    """Return the task type of a target and the reason for it.

    values: [N], lists, texts or numbers. decimal: the file's decimal mark, if known. Raises
    UserError if all values are missing or the target has too many different names.
    """
    known = [value for value in values if not is_missing(value)]
    if not known:
        raise UserError("the target is missing in every record that was examined.")
    if isinstance(known[0], list | tuple | np.ndarray):
        return "multilabel", "a list in each record"
    lists = read_lists(known)
    if lists and all(isinstance(item, str) for each in lists for item in each):
        return "multilabel", "a list in each record, as text"
    names = {repr(value) if isinstance(value, bytes) else to_name(value, "text") for value in known}
    numbers = read_numbers("target", known, decimal)[0]
    if numbers is not None:
        numbers = numbers[np.isfinite(numbers)]
    elif are_label_lists(known, MAX_CLASSES):
        return "multilabel", f"labels separated by '{find_separator(known)}'"
    if numbers is None or are_booleans(known) or len(names) == 2:
        if len(names) > min(MAX_NAMED_CLASSES, max(MAX_CLASSES, MAX_DISTINCT_SHARE * len(known))):
            raise UserError(
                f"the target has {len(names)} different values that are not numbers, such as "
                f"{shorten(known[0])}; give --task_type classification if each is a class, or "
                "another --target."
            )
        return "classification", f"{len(names)} different values"
    whole = bool(np.all(numbers == np.round(numbers)))
    if whole and len(names) <= min(MAX_CLASSES, max(2, len(known) // 10)):
        return (
            "classification",
            f"{len(names)} different integers; give --task_type regression to predict a number",
        )
    why = f"numbers from {numbers.min():g} to {numbers.max():g}"
    if whole and len(names) <= MAX_NAMED_CLASSES:
        why += "; give --task_type classification to predict each value as a class"
    return "regression", why
