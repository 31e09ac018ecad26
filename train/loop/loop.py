"""THE training loop. One for every task, any number of workers, any device.

Shapes: B a worker's part of a global batch, N samples of a split, K outputs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.config import Config
from train.data import order
from train.data.augment import Augmentation
from train.data.shards import Shards
from train.loop import evaluate, optimizers, schedule
from train.loop.precision import autocast
from train.nets import ConvNet
from train.tasks import Arrays, Task

# Samples on which a net fits its normalisation and its whitening stem.
FIT_SAMPLES = 5000

Weights = dict[str, Tensor]
Row = dict[str, float]


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Trained:
    """The weights of the epoch that was best on the validation split, and a row per epoch."""

    weights: Weights
    history: list[Row]


def build_net(config: Config, task: Task) -> ConvNet:
    """Return the task's net with initial weights. Raises ValueError if the data do not fit it."""
    height, width, channels = task.features.inputs[0].shape
    return ConvNet(
        (height, width, channels), task.target.num_outputs, config.net.widths, config.net.whiten
    )


def train(
    config: Config, shards: Shards, worker: Worker, on_epoch: Callable[[Row], None]
) -> Trained | None:
    """Train; every worker calls this, with the same arguments but its own rank.

    on_epoch: called on rank 0 with the epoch's figures. Returns the result on rank 0.
    Raises FloatingPointError when the loss is no longer finite.
    """
    loop = Loop(config, shards, worker)
    history: list[Row] = []
    best, best_weights = -np.inf, {}
    for epoch in range(config.optim.epochs):
        train_loss, seconds = loop.run_epoch(epoch)
        metrics = loop.validate()
        if worker.rank != 0:
            continue
        row = {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            **metrics,
            "samples_per_s": loop.num_samples / seconds,
            "seconds": seconds,
        }
        history.append(row)
        on_epoch(row)
        # Of equal epochs the later one: it was taken at a lower rate.
        if row[loop.metric] >= best:
            best, best_weights = row[loop.metric], loop.weights()
    return Trained(best_weights, history) if worker.rank == 0 else None


class Loop:
    """What lives through a run: data, net, optimizers, and the step they are at."""

    def __init__(self, config: Config, shards: Shards, worker: Worker) -> None:
        self._config = config
        self._worker = worker
        self._task = shards.task
        self._inputs, self._targets_N = shards.open("train")
        self._valid = shards.open("valid")
        self.num_samples = len(self._targets_N)
        self.metric = f"valid_{self._task.metric}"

        torch.manual_seed(config.seed)
        self._net = self._build_net()
        self._forward: nn.Module = self._net
        if worker.world_size > 1:
            self._forward = DistributedDataParallel(self._net)
        self._optimizers = optimizers.build(config.optim, self._net)
        self._groups = [
            (group, group["lr"]) for each in self._optimizers for group in each.param_groups
        ]
        self._augmentation = Augmentation(config.augment, config.seed, self.num_samples)
        self._autocast = autocast(config.precision, worker.device)
        steps_per_epoch = order.num_steps(self.num_samples, config.optim.batch_size)
        self._total_steps = steps_per_epoch * config.optim.epochs
        self._step = 0

    def run_epoch(self, epoch: int) -> tuple[float, float]:
        """Return the mean loss over the epoch's samples, and the seconds its steps took."""
        config, worker = self._config, self._worker
        started = time.perf_counter()
        self._augmentation.start_epoch(epoch)
        self._forward.train()
        sums = torch.zeros(2, dtype=torch.float64)  # of the loss, of samples
        for batch in order.epoch_batches(
            config.seed, epoch, self.num_samples, config.optim.batch_size
        ):
            ids_B = order.share(batch, worker.rank, worker.world_size)
            sums += torch.tensor([self._run_step(ids_B, len(batch)) * len(ids_B), len(ids_B)])
        if worker.world_size > 1:
            dist.all_reduce(sums)
        seconds = time.perf_counter() - started
        if not sums.isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite after step {self._step} of {self._total_steps}; "
                f"lower optim.lr, now {config.optim.lr:g}."
            )
        return float(sums[0] / sums[1]), seconds

    def _run_step(self, ids_B: np.ndarray, batch_size: int) -> float:
        """Take one step on this worker's share of a global batch; return the share's loss."""
        optim = self._config.optim
        factor = schedule.factor(optim, self._step, self._total_steps)
        for group, peak in self._groups:
            group["lr"] = peak * factor
        images_BHWC, *others = _to_device(self._inputs, ids_B, self._worker.device)
        targets_B = torch.from_numpy(self._targets_N[ids_B]).to(self._worker.device)
        with self._autocast:
            logits_BK = self._forward(self._augmentation.apply(images_BHWC, ids_B), *others)
        loss = F.cross_entropy(logits_BK.float(), targets_B, label_smoothing=optim.label_smoothing)
        # Gradients are averaged over workers; shares of a batch may differ by one sample.
        (loss * (len(ids_B) * self._worker.world_size / batch_size)).backward()
        for each in self._optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        self._step += 1
        return loss.item()

    def validate(self) -> Row:
        """Return the metrics of the validation split on rank 0; empty on the others."""
        inputs, targets_N = self._valid
        self._net.eval()
        with self._autocast:
            outputs = evaluate.outputs(
                self._net, inputs, self._worker.device, self._worker.rank, self._worker.world_size
            )
        return {} if outputs is None else self._task.metrics(outputs, targets_N, "valid")

    def weights(self) -> Weights:
        """Return a copy of the net's state, on the processor."""
        state = self._net.state_dict()
        return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}

    def _build_net(self) -> ConvNet:
        net = build_net(self._config, self._task)
        permutation = order.generator(self._config.seed, 0, "fit").permutation(self.num_samples)
        ids = np.sort(permutation[:FIT_SAMPLES])
        net.fit_inputs(*_to_device(self._inputs, ids, torch.device("cpu")))
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net.to(self._worker.device)


def _to_device(inputs: Arrays, ids_B: np.ndarray, device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(array[ids_B]).to(device) for array in inputs.values()]
