"""Make the variants of a net, measure them, and let the gate decide."""

import os
from pathlib import Path

import numpy as np
from torch import nn

from train.bundle.bundle import BundleWriter
from train.bundle.engines import Engine, OnnxRuntimeEngine
from train.bundle.manifest import Variant
from train.compress import export, gate, measure, quantize
from train.config import Config
from train.data import order
from train.data.shards import Shards, batches
from train.tasks import Arrays, Task

BATCH_SIZE = 256
NUM_GOLDEN = 8
# Another processor may round differently: relative to the largest golden output.
GOLDEN_TOLERANCE = {"fp32": 1e-3, "int8_static": 0.1}


def make_variants(
    net: nn.Module, config: Config, shards: Shards, writer: BundleWriter
) -> tuple[dict[str, Variant], dict[str, Arrays]]:
    """Write fp32 and each of `compress.variants` into the bundle.

    Returns what each measured, and each one's outputs on the test split. The gate compares the
    validation split, so that the test split stays apart from every choice.
    """
    task = shards.task
    train_inputs, _ = shards.open("train")
    splits = {name: shards.open(name) for name in ("valid", "test")}
    calibration = _sample(train_inputs, config.compress.calibration_records, config.seed)

    paths: dict[str, Path] = {"fp32": writer.file("variants/fp32/model.onnx")}
    sample = {name: np.resize(array, (32, *array.shape[1:])) for name, array in calibration.items()}
    export.to_onnx(net, task.features.inputs, sample, paths["fp32"])
    for variant in config.compress.variants:
        paths[variant] = writer.file(f"variants/{variant}/model.onnx")
        quantize.int8_static(paths["fp32"], paths[variant], calibration)

    num_threads = os.cpu_count() or 1
    fast = {
        name: OnnxRuntimeEngine.load(path, num_threads=num_threads) for name, path in paths.items()
    }
    single = {name: OnnxRuntimeEngine.load(path, num_threads=1) for name, path in paths.items()}
    golden_inputs = _first(splits["test"][0], NUM_GOLDEN)
    golden = {name: engine.run(golden_inputs) for name, engine in single.items()}
    writer.golden(golden_inputs, golden)

    outputs = {
        split: {name: _run(engine, inputs) for name, engine in fast.items()}
        for split, (inputs, _) in splits.items()
    }
    metrics = {name: _metrics(task, splits, outputs, name) for name in paths}
    metric = f"valid_{task.metric}"
    speeds = measure.speeds(single, golden_inputs)
    variants: dict[str, Variant] = {}
    for name, path in paths.items():
        verdict = gate.judge(
            metric,
            metrics["fp32"][metric],
            metrics[name][metric],
            config.compress.max_accuracy_drop,
        )
        largest = max(float(np.max(np.abs(array))) for array in golden[name].values())
        variants[name] = Variant(
            engine=OnnxRuntimeEngine.name,
            file=path.relative_to(writer.path).as_posix(),
            accepted=verdict.accepted,
            reason=verdict.reason,
            metrics=metrics[name],
            size_bytes=path.stat().st_size,
            p50_ms=speeds[name].p50_ms,
            records_per_s=speeds[name].records_per_s,
            golden_tolerance=GOLDEN_TOLERANCE[name] * max(1.0, largest),
        )
    return variants, outputs["test"]


def fastest(variants: dict[str, Variant]) -> str:
    """Return the accepted variant with the highest throughput."""
    accepted = [name for name, variant in variants.items() if variant.accepted]
    return max(accepted, key=lambda name: variants[name].records_per_s)


def _metrics(
    task: Task,
    splits: dict[str, tuple[Arrays, np.ndarray]],
    outputs: dict[str, dict[str, Arrays]],
    variant: str,
) -> dict[str, float]:
    merged: dict[str, float] = {}
    for split, (_, targets) in splits.items():
        merged |= task.metrics(outputs[split][variant], targets, split)
    return merged


def _run(engine: Engine, inputs: Arrays) -> Arrays:
    count = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[part] for name, array in inputs.items()})
        for part in batches(count, BATCH_SIZE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sample(inputs: Arrays, count: int, seed: int) -> Arrays:
    total = len(next(iter(inputs.values())))
    ids = np.sort(order.generator(seed, 0, "calib").permutation(total)[:count])
    return {name: array[ids] for name, array in inputs.items()}


def _first(inputs: Arrays, count: int) -> Arrays:
    return {name: np.array(array[:count]) for name, array in inputs.items()}
