"""Baseline: how the held-out records, and the answers to them, are spread; to tell drift from.

Bins are made of the training split, and counts of the validation split: what training saw itself
looks better known than any new record will be.
"""

from typing import Any

import numpy as np

from train.bundle import feature_statistics
from train.bundle.feature_statistics import Quantity, QuantityValues
from train.data.dataset import EncodedDataset, batch_slices
from train.tasks import Arrays

BATCH_SIZE = 1024
# Training records that bins are made of.
MAX_RECORDS = 50_000


def build_baseline(shards: EncodedDataset, outputs: Arrays) -> dict[str, Any]:
    """Return the baseline of a bundle, as `train.bundle.feature_statistics.read_baseline` reads it.

    outputs: what the net that will be served answers to the validation split.
    """
    trained = _measured(shards, "train", None)
    held_out = _measured(shards, "valid", outputs)
    made = {
        name: _quantity(name, measured, trained.get(name, measured))
        for name, measured in held_out.items()
    }
    states = {name: quantity.to_dict() for name, quantity in made.items()}
    return {"version": feature_statistics.VERSION, "quantities": states}


def _quantity(name: str, held_out: QuantityValues, trained: QuantityValues) -> Quantity:
    kind, labels = held_out.kind, held_out.labels
    if kind == "category":
        empty = Quantity(kind, held_out.of, np.zeros(len(labels), np.int64), labels=labels)
    else:
        edges = feature_statistics.bin_edges(trained, name)
        shape = held_out.values.shape[1:]
        empty = Quantity(
            kind, held_out.of, np.zeros((*shape, len(edges) + 2), np.int64), edges=edges
        )
    return Quantity(kind, held_out.of, empty.count(held_out.values), empty.edges, labels)


def _measured(
    shards: EncodedDataset, split: str, outputs: Arrays | None
) -> dict[str, QuantityValues]:
    """Measure a split; of the inputs alone where there are no outputs."""
    inputs, targets_N = shards.open(split)
    task = shards.task
    count = len(targets_N) if outputs is not None else min(len(targets_N), MAX_RECORDS)
    parts: list[dict[str, QuantityValues]] = []
    for part in batch_slices(count, BATCH_SIZE):
        rows = {
            name: np.asarray(array[part][: count - part.start]) for name, array in inputs.items()
        }
        answers = None
        if outputs is not None:
            answers = task.target.decode({name: array[part] for name, array in outputs.items()})
        parts.append(feature_statistics.measure_quantities(task, rows, answers))
    return {
        name: QuantityValues(
            each.kind, each.of, np.concatenate([part[name].values for part in parts]), each.labels
        )
        for name, each in parts[0].items()
    }
