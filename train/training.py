"""Train a model: `fit(config)` returns its bundle."""

import functools
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import safetensors.torch
import torch

from cluster import commit, connect, storage
from cluster.errors import UserError
from train.bundle import Bundle, publishing, signature
from train.bundle.bundle import WEIGHTS
from train.bundling import build_bundle
from train.compress.recipes.variants import check_calibration
from train.compress.scoring import validation_score
from train.config import LAST, Augment, Config, allow_code
from train.cross_validation import HISTORY, choose_epochs
from train.data import batch_sampler, dataset
from train.data.data_report import REPORT
from train.data.dataset import EncodedDataset
from train.data.schema import inference
from train.data.warm_start import CompletedConfig
from train.decision import check_recall
from train.distributed import launcher
from train.loop.net_setup import build_net, check_custom_net
from train.loop.run_directory import LEAST_SAMPLES, DistillationConfig, Run
from train.nets.losses import target_loss
from train.pretrained.backbone import attach_backbone
from train.pretrained.proposal import propose_net
from train.reports.model_card import CARD
from train.tasks import Images
from train.tasks.plugins import code_of_config, code_of_task, modules_of
from train.telemetry.throughput import Event
from train.values.ragged import lengths_of


def fit(
    config: Config | CompletedConfig, observe: Callable[[Event], None] = lambda event: None
) -> Bundle:
    """Train a model as `python train/main.py` does, and return its bundle.

        bundle = fit(Config(target="price", data={"train": "houses.csv"}))

    What the config leaves open is inferred from the records. Ray starts on this machine unless it
    runs already or RAY_ADDRESS names a cluster. Progress is printed on stderr. Unless
    registry.enabled is false, the bundle becomes a version of its model in the registry.

    config: a completed one is used unchanged. observe: called with every event of training, from
    another thread. Raises UserError for unusable data or options, CommandFailed if training fails.
    """
    if isinstance(config, Config):
        inference.check_source(config)
        connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
        config = complete(allow_code(config))
    return train_and_register(config, observe)[0]


def complete(config: Config) -> CompletedConfig:
    """Return the config with all options filled in. Raises UserError as `propose_net` does."""
    return propose_net(config, inference.complete_config(config))


def train_and_register(
    completed: CompletedConfig, observe: Callable[[Event], None] = lambda event: None
) -> tuple[Bundle, dict[str, Any]]:
    """Return the bundle, and its version, alias and URI; without a registry, no such fields.

    Raises UserError and CommandFailed as `fit` does.
    """
    config = completed.config
    root, metric = config.storage.root, config.registry.metric
    if not config.registry.enabled:
        bundle = train_bundle(completed, observe)
        print_next_steps(bundle)
        return bundle, {}
    publishing.check_publishable(root, metric)
    with publishing.RunRecorder(root, config.name, config.model_dump(mode="json")) as recording:

        def record(event: Event) -> None:
            recording.observe(event)
            observe(event)

        bundle = train_bundle(completed, record)
        score = functools.partial(validation_score, config)
        published = publishing.publish(bundle, recording, root, metric, score=score)
    print_next_steps(bundle, published["uri"])
    return bundle, published


def print_next_steps(bundle: Bundle, reference: str | None = None) -> None:
    """Print where the model card is and how to serve a registered model, on stderr."""
    print(f"model card: {storage.join_path(bundle.location, CARD)}", file=sys.stderr)
    if reference is None:
        return
    manifest = bundle.manifest
    code = modules_of(code_of_task(manifest.task) + code_of_config(manifest.config))
    plugins = f" plugins={code}" if code else ""
    print(f"next: serve run serve.app model={reference}{plugins}", file=sys.stderr)


def train_bundle(
    config: Config | CompletedConfig, observe: Callable[[Event], None] = lambda event: None
) -> Bundle:
    """Train and compress a model, without registering it; return its bundle.

    config: a completed one is used unchanged. observe: called with every event of training, from
    another thread. Raises UserError for unusable data or options, CommandFailed if training fails.
    """
    started = time.perf_counter()
    trained = train_run(config, observe)
    return build_bundle(trained.config, trained.data, trained.run, started, lineage=trained.lineage)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, and the origin of its network and initial weights, if there is one."""

    config: Config
    data: EncodedDataset
    run: Run
    lineage: dict[str, Any]


def train_run(
    config: Config | CompletedConfig, observe: Callable[[Event], None] = lambda event: None
) -> TrainedRun:
    """Train a model without compressing it, with arguments and errors as of `train_bundle`."""
    completed, data = prepare_run(config)
    config, origin = completed.config, completed.init_bundle
    runs = storage.join_path(config.storage.root, "train")
    if origin is None and config.stop.folds and config.stop.after is None:
        config, found = _with_epochs(config, data, runs)
    else:
        found = None
    run = _run(config, runs)
    if found is not None:
        run.write(HISTORY, found)
    if origin is None:
        launcher.train(config, run, data, observe=observe)
        choice = {} if completed.choice is None else {"chosen net": completed.choice}
        return TrainedRun(config, data, run, choice)
    launcher.train(config, run, data, observe=observe, lesson=_begun(run, origin))
    return TrainedRun(config, data, run, build_lineage(config.init, origin))


def prepare_run(config: Config | CompletedConfig) -> tuple[CompletedConfig, EncodedDataset]:
    """Return the completed config and the encoded data; print the data report on stderr.

    Raises UserError if the data or the options do not allow training.
    """
    if isinstance(config, Config):
        config = inference.complete_config(allow_code(config))
    completed, config = config, config.config
    signature.has_key(config.storage.signing_key)
    connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
    fitted = None
    if completed.init_bundle is not None:
        check_weights(config, completed.init_bundle)
        fitted = completed.init_bundle.task
    data = dataset.prepare_dataset(config, config.storage.root, fitted)
    print((data.folder / REPORT).read_text(), end="", file=sys.stderr)
    check_against_data(config, data)
    # With init, the encoder is that of the bundle, which may have been trained.
    return completed, data if config.init is not None else attach_backbone(config, data)


def check_against_data(config: Config, data: EncodedDataset) -> None:
    """Check the options that depend on the data. Raises UserError for one that does not fit."""
    task = data.task
    try:
        net = build_net(config, task)
        if config.net.class_path is not None:
            check_custom_net(net, config, task, data.open("train")[0])
        target_loss(task.target, config.optim, torch.device("cpu"))
    except ValueError as error:
        raise UserError(str(error)) from error
    images = task.features.images
    mixes = config.augment.mixup or config.augment.cutmix
    if mixes and not (len(images) == len(task.features.inputs) == 1):
        raise UserError(
            "augment.mixup and augment.cutmix need records with one image and no other features; "
            "leave them out."
        )
    if config.augment != Augment() and not images:
        raise UserError("augment is for images, and the records have none; leave augment out.")
    for each in (each for each in task.features.encoders if isinstance(each, Images)):
        kept = Augment(flip=config.augment.flip, translate=config.augment.translate)
        if each.has_free_height and config.augment != kept:
            raise UserError(
                f"images of '{each.column}' differ in height, so only augment.flip and "
                "augment.translate apply to them; leave the other options of augment out, or give "
                f"features.{each.column}.size a height."
            )
        side = min(each.least_HW)
        if config.augment.translate >= side:
            raise UserError(
                f"augment.translate is {config.augment.translate}, and images of '{each.column}' "
                f"have {side} pixels a side; give at most {side - 1}."
            )
    check_calibration(config, task)
    inputs, targets_N = data.open("train")
    smallest = batch_sampler.smallest_batch(
        len(targets_N), config.optim.batch_size, lengths_of(inputs), config.optim.batch_by
    )
    micro_batches = Run.count_micro_batches(config)
    if micro_batches > 1 and micro_batches * LEAST_SAMPLES > smallest:
        most = max(smallest // LEAST_SAMPLES, 1)
        raise UserError(
            f"a batch of {smallest} samples cannot be shared by {micro_batches} workers, at least "
            f"{LEAST_SAMPLES} each; give --workers.num {most} or a larger --optim.batch_size."
        )
    if micro_batches < config.workers.most:
        raise UserError(
            f"workers.micro_batches is {micro_batches} and workers.num up to "
            f"{config.workers.most}, but every worker needs a micro-batch; give "
            f"--workers.micro_batches {config.workers.most} or more."
        )
    if not config.data.train_on_valid:
        check_recall(task, config.decision_rule, data.open("valid")[1])
    known = [f"valid_{each.name}" for each in task.known_metrics]
    for option, metric, accepted in (
        ("stop.metric", config.stop.metric, known),
        ("checkpoint.metric", config.checkpoint.metric, [*known, LAST]),
        ("registry.metric", config.registry.metric, known),
        ("compress.metric", config.compress.metric, known),
    ):
        if metric is not None and metric not in accepted:
            raise UserError(f"{option} is '{metric}'; give one of {', '.join(accepted)}.")


def check_weights(config: Config, bundle: Bundle) -> None:
    """Raise UserError if the bundle's weights do not fit the network of the config."""
    try:
        wanted = build_net(config, bundle.task).state_dict()
    except ValueError as error:
        raise UserError(str(error)) from error
    found = safetensors.torch.load_file(bundle.path / WEIGHTS)
    for name in sorted(wanted.keys() | found.keys()):
        one, other = (
            "x".join(map(str, each[name].shape)) or "one number" if name in each else "missing"
            for each in (found, wanted)
        )
        if one != other:
            raise UserError(
                f"init is '{config.init}', whose weights do not fit this net: '{name}' is {one} "
                f"there and {other} here; leave the options of net out, or train without init."
            )


def _begun(run: Run, bundle: Bundle) -> DistillationConfig:
    """Copy a bundle's weights into the run's directory, where a resumed run finds them, too."""
    url = storage.join_path(run.url, "init")
    with commit.atomic_folder(url) as folder:
        shutil.copyfile(bundle.path / WEIGHTS, folder / WEIGHTS)
    return DistillationConfig(start=url)


def build_lineage(init: str | None, bundle: Bundle) -> dict[str, Any]:
    """Return the origin of a run's weights. init_epochs: of the run that started from scratch."""
    manifest = bundle.manifest
    epochs = manifest.lineage.get("init_epochs", manifest.config["optim"]["epochs"])
    return {"init": init, "init_weights": manifest.files[WEIGHTS].sha256, "init_epochs": epochs}


def _run(config: Config, runs: str) -> Run:
    """Return the run that `resume` names, or a new one, whose name is printed on stderr."""
    if config.resume is not None:
        return Run.resume(storage.join_path(runs, config.resume), config)
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    print(f"run {name}; if it stops, continue it with --resume {name}", file=sys.stderr)
    return Run.start(storage.join_path(runs, name), config)


def _with_epochs(config: Config, data: EncodedDataset, runs: str) -> tuple[Config, Any]:
    """Choose the number of epochs by cross-validation; a resumed run keeps its number.

    Returns the options, and the mean metric by epoch, None for a resumed run.
    """
    if config.resume is not None:
        stop, found = Run.find(runs, config.resume).config["stop"], None
        after = stop["after"]
    else:
        print(f"choosing the number of epochs over {config.stop.folds} folds", file=sys.stderr)
        after, found = choose_epochs(config, data)
        print(f"training for {after} epoch{'s' * (after != 1)}", file=sys.stderr)
    changes = {
        "stop": config.stop.model_copy(update={"after": after}),
        "checkpoint": config.checkpoint.model_copy(update={"metric": LAST}),
    }
    return config.model_copy(update=changes), found
