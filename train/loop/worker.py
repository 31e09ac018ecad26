"""What every training worker runs. The loop, from top to bottom.

Shapes: B the worker's part of a global batch.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from train.config import Config
from train.data import order
from train.data.augment import Augmentation
from train.data.shards import Shards
from train.loop import evaluate, optimizers, schedule
from train.loop.precision import autocast
from train.nets import ConvNet
from train.tasks import Task

WEIGHTS = "weights.safetensors"
HISTORY = "history.json"
FIT_SAMPLES = 5000


@dataclass(frozen=True)
class Job:
    """What the workers are sent: plain values only."""

    config: dict[str, Any]
    shards_url: str
    shards_summary: dict[str, Any]


def build_net(config: Config, task: Task) -> ConvNet:
    """Return the task's net with its initial weights."""
    spec = task.features.inputs[0]
    height, width, channels = spec.shape
    return ConvNet(
        (height, width, channels), task.target.num_outputs, config.net.widths, config.net.whiten
    )


def run(job: dict[str, Any]) -> None:
    """Train, and report the weights of the epoch that was best on the validation split."""
    config = Config.model_validate(job["config"])
    shards = Shards(job["shards_url"], job["shards_summary"])
    task = shards.task
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus)))

    inputs, targets_N = shards.open("train")
    valid_inputs, valid_targets = shards.open("valid")
    num_samples = len(targets_N)

    torch.manual_seed(config.seed)
    net = build_net(config, task)
    sample = np.sort(order.generator(config.seed, 0, "fit").permutation(num_samples)[:FIT_SAMPLES])
    net.fit_inputs(*(torch.from_numpy(array[sample]) for array in inputs.values()))
    net = net.to(device, memory_format=torch.channels_last)
    forward = DistributedDataParallel(net) if world_size > 1 else net

    optimizer_list = optimizers.build(config.optim, net)
    peaks = [[group["lr"] for group in each.param_groups] for each in optimizer_list]
    augmentation = Augmentation(config.augment, config.seed, num_samples)
    precision = autocast(config.precision, device)

    steps_per_epoch = order.num_steps(num_samples, config.optim.batch_size)
    total_steps = steps_per_epoch * config.optim.epochs
    history: list[dict[str, float]] = []
    best, best_weights = -np.inf, {}
    step = 0
    for epoch in range(config.optim.epochs):
        started = time.perf_counter()
        augmentation.start_epoch(epoch)
        net.train()
        loss_sum = torch.zeros(2, dtype=torch.float64)  # summed loss, samples
        for batch in order.epoch_batches(config.seed, epoch, num_samples, config.optim.batch_size):
            ids_B = order.share(batch, rank, world_size)
            images_BHWC, *others = (
                torch.from_numpy(array[ids_B]).to(device) for array in inputs.values()
            )
            targets_B = torch.from_numpy(targets_N[ids_B]).to(device)
            factor = schedule.factor(config.optim, step, total_steps)
            for each, rates in zip(optimizer_list, peaks, strict=True):
                for group, rate in zip(each.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            with precision:
                logits_BK = forward(augmentation.apply(images_BHWC, ids_B), *others)
            loss = F.cross_entropy(
                logits_BK.float(), targets_B, label_smoothing=config.optim.label_smoothing
            )
            # Gradients are averaged over workers; shares of a batch may differ by one sample.
            (loss * (len(ids_B) * world_size / len(batch))).backward()
            for each in optimizer_list:
                each.step()
                each.zero_grad(set_to_none=True)
            loss_sum += torch.tensor([loss.item() * len(ids_B), len(ids_B)])
            step += 1
        if world_size > 1:
            dist.all_reduce(loss_sum)
        if not loss_sum.isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite after step {step} of {total_steps}, at rate "
                f"{config.optim.lr * factor:.3g}; lower optim.lr, now {config.optim.lr}."
            )

        net.eval()
        with precision:
            outputs = evaluate.outputs(net, valid_inputs, device, rank, world_size)
        if outputs is None:
            continue
        seconds = time.perf_counter() - started
        row = {
            "epoch": epoch + 1,
            "train_loss": float(loss_sum[0] / loss_sum[1]),
            **task.metrics(outputs, valid_targets, "valid"),
            "samples_per_s": num_samples / seconds,
            "seconds": seconds,
        }
        history.append(row)
        # Not print: Ray Train repeats that through its own log.
        sys.stderr.write(_line(row, config.optim.epochs) + "\n")
        if row[f"valid_{task.metric}"] > best:
            best = row[f"valid_{task.metric}"]
            best_weights = {name: value.clone() for name, value in net.state_dict().items()}

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            contiguous = {name: value.cpu().contiguous() for name, value in best_weights.items()}
            safetensors.torch.save_file(contiguous, Path(folder) / WEIGHTS)
            (Path(folder) / HISTORY).write_text(json.dumps(history))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({}, checkpoint=checkpoint)


def _line(row: dict[str, float], epochs: int) -> str:
    rest = "  ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name.startswith(("train", "valid"))
    )
    return f"epoch {row['epoch']:.0f}/{epochs}  {rest}  {row['samples_per_s']:.0f} samples/s"
