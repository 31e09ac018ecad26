"""Make a bundle of a finished run: compress the model, and write everything that describes it."""

import shutil
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cluster import storage
from train import reports
from train.bundle import Bundle, BundleWriter, Manifest
from train.bundle.bundle import BASELINE, FEATURES, WEIGHTS
from train.bundle.manifest import SimpleModelFigures, TensorMetadata
from train.calibration import fit_temperature
from train.compress import compress
from train.config import Config, DecisionRule
from train.cross_validation import HISTORY
from train.data import batch_sampler
from train.data.baseline import build_baseline
from train.data.data_report import PICTURE, REPORT
from train.data.dataset import EncodedDataset
from train.decision import fit_thresholds
from train.loop import lr_schedule
from train.loop.checkpoint import load_best_weights
from train.loop.evaluate import evaluate
from train.loop.net_setup import build_net, load_trained
from train.loop.parallelism import Worker
from train.loop.run_directory import Run
from train.metrics import best_epoch
from train.reports import plots
from train.simple_models import describe_comparison, fit_simple_models


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
    load_trained(net, weights, data)
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
    kept_epoch = best_epoch(history, task.find_metric(config.epoch_metric))["epoch"]
    curves = writer.file("report/curves.png")
    plots.plot_curves(history, task.find_metric(), kept_epoch, rates, curves)
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
