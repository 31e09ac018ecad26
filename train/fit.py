"""fit(config) -> Bundle: the one entry for training."""

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

from cluster import connect, storage
from cluster.errors import UserError
from train import card, report
from train.bundle import Bundle, BundleWriter, Manifest
from train.bundle.bundle import BASELINE, FEATURES, WEIGHTS
from train.bundle.manifest import Tensor
from train.compress import compress
from train.compress.recipes import check_calibration
from train.config import LAST, Augment, Config, allow_code
from train.data import infer, order, origin, shards
from train.data.baseline import baseline
from train.data.report import PICTURE, REPORT
from train.data.shards import Shards
from train.loop import schedule, trainer
from train.loop.building import build_net
from train.loop.checkpoint import trained
from train.loop.figures import Event
from train.loop.run import LEAST_SAMPLES, Lesson, Run
from train.nets.losses import loss_of


def fit(config: Config, observe: Callable[[Event], None] = lambda event: None) -> Bundle:
    """Train, compress, and return the bundle, which is kept under `storage.path`.

    observe: told of every event of training besides the terminal, from another thread.
    Raises UserError when the data or the configuration do not allow it, Failed when training
    failed.
    """
    started = time.perf_counter()
    config, data = prepare(config)
    run = _run(config, storage.join(storage.resolve(config.storage.path), "train"))
    if config.init is None:
        trainer.train(config, run, data, observe=observe)
        return bundle(config, data, run, started)
    origin_bundle = origin.load(config)
    trainer.train(config, run, data, observe=observe, lesson=_begun(run, origin_bundle))
    return bundle(config, data, run, started, lineage=lineage_of(config.init, origin_bundle))


def prepare(config: Config) -> tuple[Config, Shards]:
    """Return the config, complete, and the encoded data; tell on stderr what the data are.

    Raises UserError when the data or the configuration do not allow to train.
    """
    root = storage.resolve(config.storage.path)
    config = allow_code(config)
    connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
    config = infer.complete(config)
    fitted = None
    if config.init is not None:
        origin_bundle = origin.load(config)
        check_weights(config, origin_bundle)
        fitted = origin_bundle.task
    data = shards.prepare(config, root, fitted)
    print((data.folder / REPORT).read_text(), end="", file=sys.stderr)
    check(config, data)
    return config, data


def bundle(
    config: Config,
    data: Shards,
    run: Run,
    started: float,
    *,
    name: str | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Bundle:
    """Compress what a finished run has trained, and return the bundle.

    started: when, by time.perf_counter. name: of the bundle's folder, the run's by default.
    lineage: for the manifest, where the options come from.
    """
    root = storage.resolve(config.storage.path)
    location = storage.join(root, "bundles", name or run.name)
    with Bundle.create(location) as writer:
        _write(writer, config, data, run, started, dict(lineage or {}))
    return Bundle.load(location)


def check(config: Config, data: Shards) -> None:
    """Raises UserError for what is only known once the data are."""
    task = data.task
    try:
        build_net(config, task)
        loss_of(task.target, config.optim, torch.device("cpu"))
    except ValueError as error:
        raise UserError(str(error)) from error
    images = task.features.images
    mixes = config.augment.mixup or config.augment.cutmix
    if mixes and not (len(images) == len(task.features.inputs) == 1):
        raise UserError(
            "augment.mixup and augment.cutmix mix images, and the records hold more than one; "
            "leave them out."
        )
    if config.augment != Augment() and not images:
        raise UserError("augment is for images, and the records hold none; leave it out.")
    check_calibration(config, task)
    smallest = order.smallest_batch(
        data.summary["splits"]["train"]["num_records"], config.optim.batch_size
    )
    lanes = Run.count_lanes(config)
    if lanes > 1 and lanes * LEAST_SAMPLES > smallest:
        most = max(smallest // LEAST_SAMPLES, 1)
        raise UserError(
            f"a batch of {smallest} samples cannot be shared by {lanes} workers, each with at "
            f"least {LEAST_SAMPLES}; give --workers.num {most} or a larger --optim.batch_size."
        )
    if lanes < config.workers.most:
        raise UserError(
            f"workers.lanes is {lanes}, and workers.num up to {config.workers.most}; every worker "
            f"computes a lane, so give --workers.lanes {config.workers.most}, or more."
        )
    known = [f"valid_{name}" for name in task.target.metric_names]
    for option, metric, accepted in (
        ("stop.metric", config.stop.metric, known),
        ("checkpoint.best", config.checkpoint.best, [*known, LAST]),
        ("registry.metric", config.registry.metric, known),
    ):
        if metric is not None and metric not in accepted:
            raise UserError(f"{option} is '{metric}'; there are {', '.join(accepted)}.")


def check_weights(config: Config, bundle: Bundle) -> None:
    """Raises UserError where the config's net does not take the bundle's weights."""
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
                f"init is '{config.init}', whose weights are of another net: '{name}' is {one} "
                f"there, {other} here; leave the options of net out, or train without init."
            )


def _begun(run: Run, bundle: Bundle) -> Lesson:
    """Keep a bundle's weights with the run, where every worker finds them, whenever it goes on."""
    url = storage.join(run.url, "init")
    with storage.written_whole(url, last=WEIGHTS) as folder:
        shutil.copyfile(bundle.path / WEIGHTS, folder / WEIGHTS)
    return Lesson(start=url)


def lineage_of(init: str, bundle: Bundle) -> dict[str, Any]:
    """Where a run's weights come from. init_epochs: those of the first, which began from none."""
    manifest = bundle.manifest
    epochs = manifest.lineage.get("init_epochs", manifest.config["optim"]["epochs"])
    return {"init": init, "init_weights": manifest.files[WEIGHTS].sha256, "init_epochs": epochs}


def _run(config: Config, runs: str) -> Run:
    """Return the run that `resume` names, or a new one, whose name goes to stderr."""
    if config.resume is not None:
        return Run.resume(storage.join(runs, config.resume), config)
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    print(f"run {name}; if it stops, continue it with --resume {name}", file=sys.stderr)
    return Run.start(storage.join(runs, name), config)


def _write(
    writer: BundleWriter,
    config: Config,
    data: Shards,
    run: Run,
    started: float,
    lineage: dict[str, Any],
) -> None:
    """Fill the bundle: weights, variants, golden outputs, baseline, pictures, manifest."""
    task = data.task
    weights, history = trained(run.store(config.checkpoint.keep))
    net = build_net(config, task)
    net.load_state_dict(weights)
    safetensors.torch.save_file(net.state_dict(), writer.file(WEIGHTS))
    writer.json(FEATURES, task.to_dict())
    writer.json("report/history.json", history)

    for name in (REPORT, PICTURE):
        shutil.copyfile(data.folder / name, writer.file(f"report/data{Path(name).suffix}"))

    made = compress(net, config, data, writer, storage.resolve(config.storage.path))
    steps = order.num_steps(data.summary["splits"]["train"]["num_records"], config.optim.batch_size)
    rates = [
        config.optim.lr * schedule.factor(config.optim, step, steps * config.optim.epochs)
        for step in range(steps * len(history))
    ]
    metric = f"valid_{task.metric}"
    report.curves(history, metric, rates, writer.file("report/curves.png"))
    writer.json(BASELINE, baseline(data, made.outputs["valid"]))
    test = *data.open("test"), made.outputs["test"]
    report.predictions(task, *test, writer.file)
    manifest = Manifest(
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=task.to_dict(),
        inputs=[Tensor.of(spec) for spec in task.features.fields],
        outputs=[Tensor.of(spec) for spec in task.target.outputs],
        files=writer.files(),
        seed=config.seed,
        data={"digest": data.summary["digest"], **data.summary["splits"]},
        config=config.model_dump(mode="json"),
        training_seconds=round(time.perf_counter() - started, 3),
        lineage=lineage,
        **made.fields,
    )
    writer.commit(card.write(writer, manifest, *test))
