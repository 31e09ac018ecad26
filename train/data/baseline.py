"""Baseline: distributions of held-out records and their predictions, for drift detection.

Bin edges come from the training split, counts from the validation split: a model is more confident
on its own training records than on any new record, so counting those would look like drift later.
"""

from typing import Any

import numpy as np

from train.bundle import feature_statistics
from train.bundle.feature_statistics import Quantity, QuantityValues
from train.data.dataset import EncodedDataset, batch_slices
from train.tasks import Arrays

BATCH_SIZE = 1024
# Largest number of training records that bin edges are computed from.
MAX_RECORDS = 50_000


def build_baseline(shards: EncodedDataset, outputs: Arrays) -> dict[str, Any]:
    """Return the baseline of a bundle; `train.bundle.feature_statistics.read_baseline` reads it.

    outputs: {"logits": float32 [N, K]} of the model to be served, for the N validation records.
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
    """Measure the quantities of a split, those of the inputs only if outputs is None."""
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
