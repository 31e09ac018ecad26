"""Train a model: `fit(config)` returns its bundle."""

import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cluster import commit, connect, storage
from cluster.errors import UserError
from train import reports
from train.bundle import Bundle, BundleWriter, Manifest, signature
from train.bundle.bundle import BASELINE, FEATURES, WEIGHTS
from train.bundle.manifest import SimpleModelFigures, TensorMetadata
from train.calibration import fit_temperature
from train.compress import compress
from train.compress.recipes.variants import check_calibration
from train.config import LAST, Augment, Config, DecisionRule, allow_code
from train.cross_validation import HISTORY, choose_epochs
from train.data import batch_sampler, dataset
from train.data.baseline import build_baseline
from train.data.data_report import PICTURE, REPORT
from train.data.dataset import EncodedDataset
from train.data.schema import inference
from train.data.warm_start import CompletedConfig
from train.decision import fit_thresholds
from train.distributed import launcher
from train.loop import lr_schedule
from train.loop.checkpoint import load_best_weights
from train.loop.evaluate import evaluate
from train.loop.net_setup import build_net
from train.loop.parallelism import Worker
from train.loop.run_directory import LEAST_SAMPLES, DistillationConfig, Run
from train.nets.losses import target_loss
from train.reports import plots
from train.simple_models import describe_comparison, fit_simple_models
from train.tasks import Images
from train.telemetry.throughput import Event


def fit(
    config: Config | CompletedConfig, observe: Callable[[Event], None] = lambda event: None
) -> Bundle:
    """Train and compress a model; return its bundle, which is stored under `storage.path`.

    config: a completed one is used unchanged. observe: called with every event of training, from
    another thread. Raises UserError for unusable data or options, CommandFailed if training fails.
    """
    started = time.perf_counter()
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
        return build_bundle(config, data, run, started)
    launcher.train(config, run, data, observe=observe, lesson=_begun(run, origin))
    return build_bundle(config, data, run, started, lineage=build_lineage(config.init, origin))


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
    return completed, data


def build_bundle(
    config: Config,
    data: EncodedDataset,
    run: Run,
    started: float,
    *,
    name: str | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Bundle:
    """Compress the model of a finished run; return its bundle.

    started: start time by time.perf_counter. name: of the bundle's folder; default: the run's.
    lineage: for the manifest, where the options or the initial weights come from.
    """
    root = config.storage.root
    location = storage.join_path(root, "bundles", name or run.name)
    with Bundle.create(location) as writer:
        _write(writer, config, data, run, started, dict(lineage or {}))
    return Bundle.load(location)


def check_against_data(config: Config, data: EncodedDataset) -> None:
    """Check the options that depend on the data. Raises UserError for one that does not fit."""
    task = data.task
    try:
        build_net(config, task)
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
        side = min(each.shape_HWC[:2])
        if config.augment.translate >= side:
            raise UserError(
                f"augment.translate is {config.augment.translate}, and images of '{each.column}' "
                f"have {side} pixels a side; give at most {side - 1}."
            )
    check_calibration(config, task)
    smallest = batch_sampler.smallest_batch(
        data.summary["splits"]["train"]["num_records"], config.optim.batch_size
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


def _fit_answers(net: nn.Module, data: EncodedDataset, rule: DecisionRule) -> EncodedDataset:
    """Return data whose task has a temperature and thresholds fitted to the validation records."""
    inputs, targets_N = data.open("valid")
    worker = Worker(0, 1, torch.device("cpu"))
    outputs = evaluate(net.eval(), inputs, worker)
    assert outputs is not None, "rank 0 has the outputs"
    task = data.task.calibrated(fit_temperature(data.task, outputs, targets_N))
    if thresholds := fit_thresholds(task, rule, outputs, targets_N):
        task = task.with_target(thresholds=thresholds)
    return data.with_task(task)


def _write(
    writer: BundleWriter,
    config: Config,
    data: EncodedDataset,
    run: Run,
    started: float,
    lineage: dict[str, Any],
) -> None:
    """Fill the bundle: weights, variants, golden outputs, baseline, plots, manifest."""
    weights, history = load_best_weights(run.store(config.checkpoint.keep))
    net = build_net(config, data.task)
    net.load_state_dict(weights)
    if not config.data.train_on_valid:
        data = _fit_answers(net, data, config.decision_rule)
    task = data.task
    safetensors.torch.save_file(net.state_dict(), writer.file(WEIGHTS))
    writer.json(FEATURES, task.to_dict())
    writer.json("report/history.json", history)
    if (folds := run.read(HISTORY)) is not None:
        writer.json(f"report/{HISTORY}", folds)

    for name in (REPORT, PICTURE):
        shutil.copyfile(data.folder / name, writer.file(f"report/data{Path(name).suffix}"))

    made = compress(net, config, data, writer, config.storage.root)
    steps = batch_sampler.num_steps(
        data.summary["splits"]["train"]["num_records"], config.optim.batch_size
    )
    rates = [
        config.optim.lr * lr_schedule.lr_factor(config.optim, step, steps * config.optim.epochs)
        for step in range(steps * len(history))
    ]
    plots.plot_curves(history, task.find_metric(), rates, writer.file("report/curves.png"))
    writer.json(BASELINE, build_baseline(data, made.outputs["valid"]))
    test = *data.open("test"), made.outputs["test"]
    simple = fit_simple_models(data, config.seed)
    comparison = describe_comparison(task, simple, test[2], test[1])
    if comparison:
        print(comparison, file=sys.stderr)
    plots.plot_predictions(task, *test, writer.file)
    manifest = Manifest(
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=task.to_dict(),
        inputs=[TensorMetadata.of(spec) for spec in task.features.fields],
        outputs=[TensorMetadata.of(spec) for spec in task.target.outputs],
        files=writer.files(),
        seed=config.seed,
        data={"digest": data.summary["digest"], **data.summary["splits"]},
        config=config.model_dump(mode="json"),
        training_seconds=round(time.perf_counter() - started, 3),
        lineage=lineage,
        simple_models=[
            SimpleModelFigures(name=e.name, metrics=e.metrics, seconds=e.seconds) for e in simple
        ],
        nullable=data.nullable,
        comparison=comparison,
        **made.fields,
    )
    writer.commit(reports.write_card(writer, manifest, *test), config.storage.signing_key)
