"""Figures of a bundle on records that it was not made with."""

import numpy as np

from cluster.errors import UserError
from train.bundle import Bundle, CorruptBundle, Predictor
from train.bundle.engines import Engine
from train.config import Config
from train.data import dataset
from train.data.dataset import batch_slices
from train.tasks import Arrays

BATCH_SIZE = 256


def run_batches(engine: Engine, inputs: Arrays) -> Arrays:
    """Return an engine's outputs for the encoded records of a split."""
    count = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[part] for name, array in inputs.items()})
        for part in batch_slices(count, BATCH_SIZE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def validation_score(config: Config, bundle: Bundle, metric: str) -> float:
    """Return a metric of another bundle, on the validation records that a config has.

    Raises UserError where the bundle cannot take the records, or cannot be run here.
    """
    data = dataset.prepare_dataset(config, config.storage.root, bundle.task)
    inputs, targets_N = data.open("valid")
    try:
        outputs = run_batches(Predictor.load(bundle).engine, inputs)
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error
    return bundle.task.metrics(outputs, targets_N, "valid")[metric]
