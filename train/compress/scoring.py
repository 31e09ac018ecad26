"""Run a model on the records of a split and compute its metrics. Shapes: N records."""

from cluster.errors import UserError
from train.bundle import Bundle, CorruptBundle, Predictor
from train.bundle.engines import run_batches
from train.config import Config
from train.data import dataset


def validation_score(config: Config, bundle: Bundle, metric: str) -> float:
    """Return a metric of `bundle` on the validation records of `config`.

    Raises UserError if the bundle cannot encode these records or cannot be run on this machine.
    """
    data = dataset.prepare_dataset(config, config.storage.root, bundle.task)
    inputs, targets_N = data.open("valid")
    try:
        outputs = run_batches(Predictor.load(bundle).engine.run, inputs)
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error
    return bundle.task.metrics(outputs, targets_N, "valid")[metric]
