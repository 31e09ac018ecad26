"""Labelled requests as records to learn from and to judge by."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cluster.errors import UserError
from serve.requestlog.sampling import HELD_OUT, in_fraction
from train.tasks import LabelsTarget, NamedTarget, Task, ValueTarget
from train.values.label_lists import SEPARATOR

# Share of the labelled requests that is not learned from; by their content, so that none that was
# held out once is ever learned from, whoever sends it again.
SHARE_HELD_OUT = 0.3


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled records that a model can learn from, in two parts."""

    training: pa.Table
    held_out: pa.Table


def usable_rows(table: pa.Table, task: Task) -> pa.Table:
    """The rows whose truth the task knows: one of its names, or a finite number.

    Raises UserError for a target that is neither.
    """
    if not isinstance(task.target, NamedTarget | ValueTarget):
        raise UserError(
            f"the target is a {type(task.target).__name__} of your own, of which nothing here says "
            "what is better; retraining is for names and numbers."
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
    """The records in the columns of the training data, to learn from and held out.

    All of a request are in the same part, and so is a request with the same records, whenever they
    are divided. A record that is held out is not learned from, whichever request it is of.
    """
    if not table.num_rows:  # nor columns, where nothing is logged
        return LabelledSplit(table, table)
    records = table["record"].combine_chunks()
    names = [records.type.field(number).name for number in range(records.type.num_fields)]
    if missing := [name for name in task.features.columns if name not in names]:
        raise UserError(
            f"the logged requests have no field '{missing[0]}'; they have {', '.join(names)}. What "
            "the log leaves out cannot be learned from: have it logged, or retrain by hand."
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
