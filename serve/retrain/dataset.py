"""Splits labelled requests into training records and held-out records for the comparison."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cluster.errors import UserError
from serve.requestlog.sampling import HELD_OUT, in_fraction
from train.tasks import LabelsTarget, NamedTarget, Task, ValueTarget
from train.values.label_lists import SEPARATOR

# Fraction of the labelled requests that is held out. It is selected by content, so that a record
# that was held out once is never trained on, even if another request repeats it.
SHARE_HELD_OUT = 0.3


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled records in the columns of the training data, in two disjoint parts."""

    training: pa.Table
    held_out: pa.Table


def usable_rows(table: pa.Table, task: Task) -> pa.Table:
    """Return the rows whose label is one of the task's classes or a finite number.

    Raises UserError for a custom target.
    """
    if not isinstance(task.target, NamedTarget | ValueTarget):
        raise UserError(
            f"the target is a custom {type(task.target).__name__}; retraining supports only "
            "targets that are classes, labels or numbers."
        )
    known = [_is_known(truth, task) for truth in table["truth"].to_pylist()]
    return table.filter(pa.array(known, pa.bool_()))


def _is_known(truth: Any, task: Task) -> bool:
    if truth is None:
        return False
    if isinstance(task.target, NamedTarget):
        if isinstance(task.target, LabelsTarget):
            return all(name in task.target.classes for name in truth.split(SEPARATOR) if name)
        return truth in task.target.classes
    return bool(np.isfinite(truth))


def split_labelled(table: pa.Table, task: Task) -> LabelledSplit:
    """Split labelled rows, in the columns of the training data, into training and held-out rows.

    All rows of a request are in the same part, and equal requests are always in the same part, also
    in later calls. A record that is held out in one request is not trained on in another. Raises
    UserError if the log lacks a field of the model.
    """
    if not table.num_rows:  # an empty log has no column "record"
        return LabelledSplit(table, table)
    records = table["record"].combine_chunks()
    names = [records.type.field(number).name for number in range(records.type.num_fields)]
    if missing := [name for name in task.features.columns if name not in names]:
        raise UserError(
            f"the logged requests have no field '{missing[0]}'; they have {', '.join(names)}. "
            "Remove it from log.exclude_fields and collect new requests, or train by hand."
        )
    columns = {name: records.field(name) for name in task.features.columns}
    whole = pa.table({**columns, task.target.column: table["truth"]})
    contents = [repr(sorted(row.items())) for row in pa.table(columns).to_pylist()]
    keys = table["id"].to_pylist()
    first: dict[str, str] = {}
    for key, content in zip(keys, contents, strict=True):
        first.setdefault(key, content)
    held_out = [in_fraction(first[key], SHARE_HELD_OUT, HELD_OUT) for key in keys]
    never = {content for content, held in zip(contents, held_out, strict=True) if held}
    training = [content not in never for content in contents]
    return LabelledSplit(
        whole.filter(pa.array(training, pa.bool_())), whole.filter(pa.array(held_out, pa.bool_()))
    )
