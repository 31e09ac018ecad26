"""Run a model on the records of a split and compute its metrics. Shapes: N records."""

import numpy as np

from cluster.errors import UserError
from train.bundle import Bundle, CorruptBundle, Predictor
from train.bundle.engines import Engine
from train.config import Config
from train.data import dataset
from train.data.dataset import batch_slices
from train.tasks import Arrays
from train.values.ragged import StoredArrays, by_length, in_place
from train.values.records import num_rows

BATCH_SIZE = 256


def run_batches(engine: Engine, inputs: StoredArrays) -> Arrays:
    """Return an engine's outputs [N, ...] by name, computed in batches of BATCH_SIZE.

    inputs: encoded arrays [N, ...] by input name, N ≥ 1. Records that differ in length are batched
    with others of about their length.
    """
    order = by_length(inputs)
    parts = [
        engine.run(
            {name: array[part if order is None else order[part]] for name, array in inputs.items()}
        )
        for part in batch_slices(num_rows(inputs), BATCH_SIZE)
    ]
    return {
        name: in_place(np.concatenate([part[name] for part in parts]), order) for name in parts[0]
    }


def validation_score(config: Config, bundle: Bundle, metric: str) -> float:
    """Return a metric of `bundle` on the validation records of `config`.

    Raises UserError if the bundle cannot encode these records or cannot be run on this machine.
    """
    data = dataset.prepare_dataset(config, config.storage.root, bundle.task)
    inputs, targets_N = data.open("valid")
    try:
        outputs = run_batches(Predictor.load(bundle).engine, inputs)
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error
    return bundle.task.metrics(outputs, targets_N, "valid")[metric]
