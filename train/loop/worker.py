"""What every Ray Train worker runs: the loop, its progress on stderr, its result as checkpoint."""

import json
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train.torch
import safetensors.torch
import torch

from train.config import Config
from train.data.shards import Shards
from train.loop.loop import Row, Worker, train

WEIGHTS = "weights.safetensors"
HISTORY = "history.json"


@dataclass(frozen=True)
class Job:
    """What the workers are sent: plain values only."""

    config: dict[str, Any]
    shards_url: str
    shards_summary: dict[str, Any]


def run(job: dict[str, Any]) -> None:
    """Train, and report weights and history as the checkpoint of rank 0."""
    # Ray Train records each of its own steps; the terminal is for the run's progress.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    config = Config.model_validate(job["config"])
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    if worker.device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus)))

    def show(row: Row) -> None:
        # Not print: Ray Train repeats that through its own log.
        sys.stderr.write(_line(row, config.optim.epochs) + "\n")

    trained = train(config, Shards(job["shards_url"], job["shards_summary"]), worker, show)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if trained is not None:
            safetensors.torch.save_file(trained.weights, Path(folder) / WEIGHTS)
            (Path(folder) / HISTORY).write_text(json.dumps(trained.history))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({}, checkpoint=checkpoint)


def _line(row: Row, epochs: int) -> str:
    rest = "  ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name.startswith(("train", "valid"))
    )
    return f"epoch {row['epoch']:.0f}/{epochs}  {rest}  {row['samples_per_s']:.0f} samples/s"
