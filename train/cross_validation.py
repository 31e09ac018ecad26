"""Choose the number of epochs by cross-validation, for data with too few validation records."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.errors import CommandFailed
from train.config import LAST, Checkpoint, Config, Stop, Workers
from train.data import batch_sampler
from train.data.dataset import EncodedDataset
from train.loop.checkpoint import TrainingState
from train.loop.loop import Diverged, Loop
from train.loop.parallelism import Worker
from train.metrics import best_epoch
from train.values.ragged import StoredArrays, take

HISTORY = "cross_validation.json"


def choose_epochs(config: Config, data: EncodedDataset) -> tuple[int, list[dict[str, float]]]:
    """Return the number of epochs to train for, and the mean metric on which it is based, by epoch.

    The training records are divided into `stop.folds` parts. For each part a network is trained on
    the other parts and validated on this part. All networks advance by one epoch at a time, until
    the mean of `stop.metric` over the parts has not improved for `stop.patience` epochs. Raises
    CommandFailed if a network diverges.
    """
    try:
        return _choose_epochs(config, data)
    except Diverged as error:
        reason = str(error).removesuffix(" The last checkpoint is kept.")
        raise CommandFailed(f"cross-validation failed: {reason}") from error


def _choose_epochs(config: Config, data: EncodedDataset) -> tuple[int, list[dict[str, float]]]:
    metric = data.task.find_metric(config.stop.metric)
    # The networks are small: each is trained in this process, uncompiled, by a single worker.
    changes: dict[str, Any] = {"stop": Stop(), "checkpoint": Checkpoint(metric=LAST)}
    alone = config.model_copy(update=changes | {"workers": Workers(num=(1, 1)), "compile": False})
    worker = Worker(0, 1, torch.device("cpu"))
    loops = [
        Loop(alone, fold, worker, _NoCheckpoints(), num_micro_batches=1)  # type: ignore[arg-type]
        for fold in folds_of(config, data)
    ]
    rows: list[dict[str, float]] = []
    for _ in zip(*(loop.epochs() for loop in loops), strict=True):
        values = [loop.progress.history[-1][metric.name] for loop in loops]
        rows.append({"epoch": len(rows) + 1, metric.name: float(np.mean(values))})
        best = int(best_epoch(rows[::-1], metric)["epoch"])
        if len(rows) - best >= config.stop.patience:
            break
    return best, rows


@dataclass(frozen=True)
class _Fold(EncodedDataset):
    """The training records of a data set, with one part of them as the validation split."""

    part: tuple[int, int]
    seed: int

    def open(self, name: str) -> tuple[StoredArrays, np.ndarray]:
        inputs, targets_N = super().open("train")
        number, count = self.part
        order = batch_sampler.random_stream(self.seed, 0, "folds").permutation(len(targets_N))
        parts = np.array_split(order, count)
        held_out = parts.pop(number)
        ids = np.sort(held_out if name == "valid" else np.concatenate(parts))
        return take(inputs, ids), targets_N[ids]


def folds_of(config: Config, data: EncodedDataset) -> Iterator[EncodedDataset]:
    """Yield the training records once for each fold, which is the validation split.

    The folds of the same records are the same however they are encoded.
    """
    # At most one part per record, so that no part is empty.
    count = min(config.stop.folds, data.summary["splits"]["train"]["num_records"])
    for number in range(count):
        yield _Fold(data.url, data.summary, (number, count), config.seed)


class _NoCheckpoints:
    """Replaces the CheckpointManager of a run that writes no checkpoints."""

    def latest(self) -> TrainingState | None:
        return None

    def save(self, state: TrainingState, best_step: int | None) -> None:
        pass

    def settle(self) -> None:
        return None

    def finish(self) -> None:
        pass
