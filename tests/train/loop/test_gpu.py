"""The loop on a CUDA device: number formats, lack of memory, energy. Skipped without a device."""

import numpy as np
import pytest
import torch

from tests.conftest import make_config
from tests.train.loop.test_recovery import Told, job_of
from train.bundle import BundleWriter
from train.compress import compress
from train.distributed.worker import run_loop
from train.loop import evaluate
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Loop
from train.loop.net_setup import build_net
from train.loop.parallelism import Worker
from train.loop.run_directory import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = Worker(rank=0, world_size=1, device=torch.device("cuda", 0))


def options(config, **changes):
    return make_config(
        **{"optim": {"epochs": 8, "batch_size": 64}, **changes},
        storage={"path": config.storage.path},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_works_in_each_number_format(precision, compiled, config, digits, tmp_path):
    told = Told()
    store = CheckpointManager(str(tmp_path), keep=2)
    on_gpu = options(config, precision=precision, compile=compiled)
    Loop(on_gpu, digits, GPU, store, num_micro_batches=1, observe=told.send).run()
    weights, history = load_best_weights(store)
    assert max(row["valid_accuracy"] for row in history) > 0.9
    for row in history:
        assert row["flops_per_s"] > 0
        assert row["peak_memory_bytes"] > 0

    # The CPU reaches the same accuracy with these weights.
    net = build_net(on_gpu, digits.task)
    net.load_state_dict(weights)
    inputs, targets = digits.open("valid")
    outputs = evaluate.evaluate(net.eval(), inputs, Worker(0, 1, torch.device("cpu")))
    accuracy = float((outputs["logits"].argmax(1) == np.array(targets)).mean())
    assert accuracy == pytest.approx(max(row["valid_accuracy"] for row in history), abs=0.02)


def test_reported_energy_only_increases(config, digits, tmp_path):
    store = CheckpointManager(str(tmp_path), keep=2)
    Loop(options(config), digits, GPU, store, num_micro_batches=1).run()
    joules = [row["joules"] for row in load_best_weights(store)[1] if "joules" in row]
    assert joules == sorted(joules)
    assert all(value > 0 for value in joules)


def test_out_of_memory_on_a_gpu_halves_the_micro_batch(config, digits, tmp_path):
    wide = options(
        config,
        net={"widths": [512, 512]},
        optim={"epochs": 1, "batch_size": 1024},
        precision="fp32",
        workers={"num": 1, "gpu": True},
    )
    job, told = job_of(wide, digits, tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(800 * 2**20 / total)
    try:
        for _ in range(6):
            torch.cuda.empty_cache()
            try:
                run_loop(job, Run.open(job.run_url), GPU)
            except torch.OutOfMemoryError:
                continue
            break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told.of("halved")
    assert told.of("epoch")


@pytest.mark.parametrize("variant", ["bf16", "fp16", "int8", "fp8"])
def test_gpu_variants_agree_with_the_net(variant, config, digits, tmp_path):
    if variant in ("int8", "fp8"):
        pytest.importorskip("torchao")
    store = CheckpointManager(str(tmp_path / "checkpoints"), keep=2)
    Loop(options(config), digits, GPU, store, num_micro_batches=1).run()
    net = build_net(config, digits.task)
    net.load_state_dict(load_best_weights(store)[0])
    wanted = options(config, compress={"variants": [variant], "measure_seconds": 1})
    writer = BundleWriter(tmp_path / "bundle")
    made = compress(net, wanted, digits, writer, str(tmp_path / "runs"))
    assert made.skipped == {}
    assert made.variants[variant].agreement > 0.98
