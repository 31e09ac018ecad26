"""fit(config) -> Bundle: the one entry for training."""

import json
import math
import os
import secrets
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch

from cluster import connect, storage
from cluster.errors import UserError
from train import report
from train.bundle import Bundle, BundleWriter, Manifest
from train.bundle.bundle import BASELINE, FEATURES
from train.bundle.manifest import Tensor
from train.compress import fastest, make_variants
from train.config import Config
from train.data import shards
from train.data.baseline import baseline
from train.data.shards import Shards
from train.loop import worker
from train.loop.loop import build_net

PACKAGES = ("ray", "torch", "onnx", "onnxruntime", "numpy")


def fit(config: Config) -> Bundle:
    """Train, compress, and return the bundle, which is kept under `storage.path`.

    Raises UserError when the data or the configuration do not allow it.
    """
    started = time.perf_counter()
    root = storage.resolve(config.storage.path)
    data = shards.prepare(config, root)
    try:
        build_net(config, data.task)
    except ValueError as error:
        raise UserError(str(error)) from error
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    checkpoint = _train(config, data, storage.join(root, "train"), name)
    location = storage.join(root, "bundles", name)
    with Bundle.create(location) as writer:
        _write(writer, config, data, checkpoint, started)
    return Bundle.load(location)


def _train(config: Config, data: Shards, runs: str, name: str) -> Path:
    """Run the loop on Ray Train; return a local directory with weights and history."""
    needed = math.ceil(config.workers.num * config.workers.cpus)
    connect.connect(num_cpus=max(os.cpu_count() or 1, needed))
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from train.loop.trainer import LocalTorchTrainer

    trainer_class = LocalTorchTrainer if connect.is_local() else TorchTrainer
    job = worker.Job(config.model_dump(mode="json"), data.url, data.summary)
    trainer = trainer_class(
        worker.run,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(
            num_workers=config.workers.num,
            use_gpu=config.workers.gpu,
            resources_per_worker={"CPU": config.workers.cpus},
        ),
        run_config=RunConfig(name=name, storage_path=runs),
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint is not None, "the workers report one"
    return Path(checkpoint.to_directory())


def _write(
    writer: BundleWriter, config: Config, data: Shards, checkpoint: Path, started: float
) -> None:
    """Fill the bundle: weights, variants, golden outputs, baseline, pictures, manifest."""
    task = data.task
    history: list[dict[str, float]] = json.loads((checkpoint / worker.HISTORY).read_text())
    net = build_net(config, task)
    net.load_state_dict(safetensors.torch.load_file(checkpoint / worker.WEIGHTS))
    safetensors.torch.save_file(net.state_dict(), writer.file(worker.WEIGHTS))
    writer.json(FEATURES, task.to_dict())
    writer.json(BASELINE, baseline(data))
    writer.json("report/history.json", history)

    variants, test_outputs = make_variants(net.folded(), config, data, writer)
    default = fastest(variants)
    metric = f"valid_{task.metric}"
    _, test_targets = data.open("test")
    classes = task.target.to_dict()["classes"]
    predicted = test_outputs[default]["logits"].argmax(axis=1)
    report.curves(history, metric, writer.file("report/curves.png"))
    report.confusion(predicted, test_targets, classes, writer.file("report/confusion.png"))
    report.tradeoff(variants, f"test_{task.metric}", default, writer.file("report/variants.png"))
    writer.commit(
        Manifest(
            name=config.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            task=task.to_dict(),
            inputs=[Tensor.of(spec) for spec in task.features.inputs],
            outputs=[Tensor.of(spec) for spec in task.target.outputs],
            files=writer.files(),
            versions=_versions(),
            seed=config.seed,
            data={"digest": data.summary["digest"], **data.summary["splits"]},
            config=config.model_dump(mode="json"),
            metrics=variants["fp32"].metrics,
            variants=variants,
            default_variant=default,
            training_seconds=round(time.perf_counter() - started, 3),
        )
    )


def _versions() -> dict[str, Any]:
    return {package: version(package) for package in PACKAGES}
