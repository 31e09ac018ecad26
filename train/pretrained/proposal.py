"""With few records: compare a pretrained encoder with a network trained from scratch.

The encoder is that of the environment variable HALYARD_PRETRAINED or, for texts, one in the cache
of the Hugging Face hub.
"""

import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np

from cluster import connect, storage
from cluster.errors import CommandFailed, UserError
from train.config import Config, validate_config
from train.cross_validation import choose_epochs, folds_of
from train.data import dataset
from train.data.schema import inference
from train.data.schema.defaults import LOSS
from train.data.warm_start import CompletedConfig
from train.loop.run_directory import Run
from train.nets.pretrained.hub import PRETRAINED, is_configured, local_checkpoint
from train.pretrained.backbone import attach_backbone
from train.simple_models import fit_simple_models

SCRATCH = "a net trained from scratch"


def propose_net(config: Config, completed: CompletedConfig) -> CompletedConfig:
    """Return the completed config of the network with the lowest loss in cross-validation.

    Networks are compared if the records are few, the config has no options of net, and a pretrained
    encoder for a feature is on this machine. The comparison is printed on stderr. A resumed run
    keeps its network. Raises UserError if HALYARD_PRETRAINED names no usable encoder.
    """
    scratch = completed.config
    found = {feature.kind for feature in scratch.features.values()}
    kind = next((kind for kind in ("text", "image") if kind in found), None)
    if config.net.model_fields_set or config.init is not None or kind is None:
        return completed
    if config.resume is not None:
        run = Run.find(storage.join_path(scratch.storage.root, "train"), config.resume)
        name = run.config["net"].get("pretrained")
        return completed if name is None else _with_encoder(config, scratch, name)
    if kind == "text" and not (scratch.stop.folds and scratch.stop.metric == LOSS):
        return completed
    checkpoint = local_checkpoint(kind)
    if checkpoint is None:
        return completed
    candidate = _with_encoder(config, scratch, checkpoint.name)
    stop = candidate.config.stop
    if candidate.config.net.freeze != "all" or not stop.folds or stop.metric != LOSS:
        return completed  # the records are not few, or other metrics decide
    encoder = f"the pretrained encoder '{checkpoint.name}'"
    print(
        f"few records: comparing {encoder} with {SCRATCH} and simple models over "
        f"{stop.folds} folds; give --net.pretrained, or set {PRETRAINED} to nothing, to "
        "skip this",
        file=sys.stderr,
    )
    connect.connect(num_cpus=scratch.workers.all_cpus, metrics=False)
    try:
        of_encoder = _loss(candidate.config)
    except (UserError, CommandFailed) as error:
        if is_configured():
            raise
        print(f"{encoder} is left out: {error}", file=sys.stderr)
        return completed
    # Networks for images that are trained from scratch have no folds otherwise.
    compared = scratch.model_copy(update={"stop": stop})
    losses = {encoder: of_encoder, SCRATCH: _loss(compared), **_simple_losses(compared)}
    reason = explain_choice(losses, encoder)
    print(reason, file=sys.stderr)
    chosen = candidate if losses[encoder] < losses[SCRATCH] else completed
    return replace(chosen, choice=reason)


def explain_choice(losses: dict[str, float], encoder: str) -> str:
    """Return a line with the network that is chosen and the losses that it was chosen by.

    losses: mean loss over the folds by candidate: `encoder`, SCRATCH and simple models.
    """
    chosen = encoder if losses[encoder] < losses[SCRATCH] else SCRATCH
    figures = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    line = f"chose {chosen} by the loss on held-out folds: {figures}"
    best = min(losses, key=lambda name: losses[name])
    return line if best == chosen else f"{line}; {best} has the lowest loss of all"


def _with_encoder(config: Config, scratch: Config, name: str) -> CompletedConfig:
    """Complete the config with an encoder, and with the columns that were inferred already."""
    given = config.model_dump(mode="json", exclude_unset=True)
    known = scratch.model_dump(mode="json", exclude_unset=True)
    columns = {key: known[key] for key in ("features", "task_type", "data")}
    return inference.complete_config(
        validate_config({**given, **columns, "net": {"pretrained": name}})
    )


def _loss(config: Config) -> float:
    try:
        data = attach_backbone(config, dataset.prepare_dataset(config, config.storage.root))
        epochs, rows = choose_epochs(config, data)
    except ValueError as error:
        raise UserError(str(error)) from error
    assert config.stop.metric is not None
    return rows[epochs - 1][config.stop.metric]


def _simple_losses(config: Config) -> dict[str, float]:
    """Return the mean loss of each simple model over the same folds."""
    data = dataset.prepare_dataset(config, config.storage.root)
    fitted = [fit_simple_models(fold, config.seed) for fold in folds_of(config, data)]
    losses: dict[str, list[float]] = defaultdict(list)
    for model in (model for fold in fitted for model in fold):
        losses[f"a {model.name} model"].append(model.metrics["valid_loss"])
    return {name: float(np.mean(values)) for name, values in sorted(losses.items())}
