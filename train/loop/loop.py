"""The training loop: one for all tasks, numbers of workers and devices.

The order of samples, augmentation, dropout and learning rate of a step depend only on the config
and the step. A run that continues from a checkpoint therefore takes the same steps as without the
interruption, on any number of workers.

Shapes: B samples of a micro-batch, N samples of a split, K outputs.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from train.config import Config
from train.data import batch_sampler
from train.data.augment import Augmentation
from train.data.dataset import EncodedDataset, read_at_random
from train.loop import (
    distillation,
    evaluate,
    lr_schedule,
    net_setup,
    optimizers,
    parallelism,
    precision,
)
from train.loop.checkpoint import CheckpointManager, TrainingState
from train.loop.parallelism import Buffers, Worker
from train.loop.run_directory import NO_LESSON, DistillationConfig
from train.loop.state_dict import EMA, averaged_weights, collect_state, restore_state
from train.nets.losses import target_loss
from train.tasks import Task
from train.telemetry.throughput import Event, ThroughputMeter
from train.values.ragged import lengths_of

TELL_EVERY_STEPS = 10


class Diverged(Exception):
    """The loss or the weights are not finite. The message names step and learning rate."""


@dataclass
class Progress:
    """The progress of a run, as stored in its checkpoints."""

    step: int = 0
    num_samples: int = 0  # of this epoch so far, computed by this worker
    seconds: float = 0.0  # of this epoch so far
    best: float = -math.inf
    best_step: int | None = None
    stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


class Loop:
    """A run that continues from its last checkpoint, if it has one.

    Every worker has its own Loop and calls the same methods.

    num_micro_batches: parts of a global batch, the same for the whole run; at least the world size.
    observe: called on rank 0 with the events of the start, steps, epochs and failed checkpoints.
    urgent: returns whether to write a checkpoint now, for example before this machine is removed.
    after_step: called after every step.
    build: returns the network with its initial weights.
    lesson: initial weights from another network, and a teacher, if there are any.
    """

    def __init__(
        self,
        config: Config,
        shards: EncodedDataset,
        worker: Worker,
        store: CheckpointManager,
        *,
        num_micro_batches: int,
        observe: Callable[[Event], None] = lambda event: None,
        urgent: Callable[[], bool] = lambda: False,
        after_step: Callable[[], None] = lambda: None,
        build: Callable[[Config, Task], nn.Module] = net_setup.build_net,
        lesson: DistillationConfig = NO_LESSON,
    ) -> None:
        assert worker.world_size <= num_micro_batches
        self._config, self._worker, self._store = config, worker, store
        self._num_micro_batches, self._urgent, self._stepped = num_micro_batches, urgent, after_step
        shards = net_setup.prepared(config, shards)
        self._task = shards.task
        self._inputs, self._targets_N = shards.open("train")
        read_at_random(self._inputs)
        self._lengths_N = lengths_of(self._inputs)
        self._valid = shards.open("valid")
        self._metric = self._task.find_metric(config.epoch_metric)

        optim, count = config.optim, len(self._targets_N)
        self._steps_per_epoch = batch_sampler.num_steps(count, optim.batch_size)
        self._total_steps = self._steps_per_epoch * optim.epochs
        self._augmentation = Augmentation(
            config.augment, config.seed, count, self._task.features.images
        )
        self._criterion = target_loss(self._task.target, optim, worker.device)

        precision.set_backend_flags(worker.device)
        dtype = precision.compute_dtype(config.precision, worker.device)
        self._autocast = precision.autocast(dtype, worker.device)
        self._scaler = precision.gradient_scaler(dtype, worker.device)
        torch.manual_seed(config.seed)
        net = build(config, self._task)
        if not distillation.load_initial_weights(net, lesson):
            net_setup.load_backbone(net, shards)
            net_setup.fit_inputs(net, config, self._inputs)
        net_setup.drop_backbone(net, shards)
        self._net = net_setup.place_net(net, config, worker)
        self._teacher = (
            distillation.Teacher(lesson, self._task, worker) if lesson.teacher is not None else None
        )
        self._ema = EMA(self._net, optim.ema_decay) if optim.ema_decay else None
        self._optimizers = optimizers.build_optimizers(optim, self._net, dtype)
        self._groups = [
            (group, group["lr"]) for each in self._optimizers for group in each.param_groups
        ]
        self._gradients = parallelism.build_gradients(self._net, worker, config.workers.parallel)
        self._buffers = Buffers(self._net, worker, num_micro_batches)
        self._forward = self._gradients.forward
        if config.compile:
            self._forward = torch.compile(self._forward)  # type: ignore[assignment]
        # Kept on the device and read only every few steps, because reading it waits for the GPU.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        self._check_every = 1 if worker.device.type == "cpu" else 10
        self.progress = Progress()
        self._saved_at = time.monotonic()
        self._throughput = ThroughputMeter(
            observe, rank=worker.rank, world_size=worker.world_size, device=worker.device
        )
        self._stage = self._augmentation.stage(0.0)
        self._flops = net_setup.flops_per_sample(
            self._net, config, self._inputs, worker, self._augmentation
        )
        self._restore()

    def run(self) -> None:
        """Train to the end.

        Raises Diverged if the loss or the weights are not finite, OSError if the last checkpoint
        cannot be written.
        """
        for _ in self.epochs():
            pass

    def epochs(self) -> Iterator[None]:
        """Train to the end, yielding after each epoch. Raises the same errors as `run`."""
        optim, stop = self._config.optim, self._config.stop
        self._throughput.report(
            "start",
            workers=self._worker.world_size,
            step=self.progress.step,
            total_steps=self._steps_per_epoch * min(optim.epochs, stop.after or optim.epochs),
        )
        while self.progress.step < self._total_steps and not self.progress.stopped:
            epoch, first = divmod(self.progress.step, self._steps_per_epoch)
            self._augmentation.start_epoch(epoch)
            batches = batch_sampler.epoch_batches(
                self._config.seed,
                epoch,
                len(self._targets_N),
                optim.batch_size,
                self._lengths_N,
                optim.batch_by,
            )
            started = time.perf_counter() - self.progress.seconds
            for batch in batches[first:]:
                self._take_step(batch)
                self.progress.seconds = time.perf_counter() - started
                self._after_step()
                self._stepped()
            self._end_epoch(epoch)
            yield
        self._store.finish()

    def _take_step(self, batch: np.ndarray) -> None:
        """Take a step on the samples of a global batch, given by index."""
        self._net.train()
        factor = lr_schedule.lr_factor(self._config.optim, self.progress.step, self._total_steps)
        for group, peak in self._groups:
            group["lr"] = peak * factor
        self._stage = self._augmentation.stage(self.progress.step / self._total_steps)
        parts = batch_sampler.split_micro_batches(batch, self._num_micro_batches)
        micro_batches = self._worker.micro_batches(self._num_micro_batches)
        self._buffers.start()
        for micro_batch in micro_batches:
            ids_B = parts[micro_batch]
            with self._gradients.micro_batch(last=micro_batch == micro_batches[-1]):
                loss = self._loss(ids_B, micro_batch)
                self._buffers.collect()
                self._scaler.scale(loss * (len(ids_B) / len(batch))).backward()
            # After the backward pass, because recomputing activations updates the norms again.
            self._buffers.restore()
            self._loss_sum += loss.detach() * len(ids_B)
            self.progress.num_samples += len(ids_B)
            self._throughput.add_flops(len(ids_B) * self._flops.get(self._stage, 0.0))
        self._buffers.finish()
        self._gradients.finish()
        for each in self._optimizers:
            self._scaler.unscale_(each)
        overflow = self._scaler.is_enabled() and self._has_overflow()
        if self._config.optim.clip_norm is not None and not overflow:
            nn.utils.clip_grad_norm_(self._net.parameters(), self._config.optim.clip_norm)
        if self.progress.step % TELL_EVERY_STEPS == 0:
            self._tell_step(factor)
        for each in self._optimizers:
            # If any gradient overflowed, on any worker, all optimizers skip the step.
            if not overflow:
                self._scaler.step(each)
            each.zero_grad(set_to_none=True)
        if overflow:  # the scaler of a worker sees only its own shard of the gradients
            self._scaler.update(self._scaler.get_scale() * self._scaler.get_backoff_factor())
        else:
            self._scaler.update()
        self.progress.step += 1
        if self._ema is not None:
            self._ema.update(self._net, self.progress.step)

    def _has_overflow(self) -> bool:
        """Return whether a gradient of any worker is not finite."""
        grads = [param.grad for param in self._net.parameters() if param.grad is not None]
        norm = parallelism.full_tensor(nn.utils.get_total_norm(grads))
        return self._worker.any(not bool(norm.isfinite()))[0]

    def _tell_step(self, factor: float) -> None:
        """Report a step before its gradients are reset.

        The loss is the mean of this worker's samples in the epoch so far.
        """
        grads = [param.grad for param in self._net.parameters() if param.grad is not None]
        self._throughput.report_steps(
            self.progress.step,
            len(self._targets_N) / self._steps_per_epoch,
            loss=self._loss_sum.item() / max(self.progress.num_samples, 1),
            rate=self._groups[0][1] * factor,
            grad_norm=parallelism.full_tensor(nn.utils.get_total_norm(grads)).item(),
        )

    def _loss(self, ids_B: np.ndarray, micro_batch: int) -> Tensor:
        """Return the mean loss of a micro-batch's samples, float32 []."""
        config, device = self._config, self._worker.device
        # Dropout and mixing depend on the step and the micro-batch, not on the worker that computes
        # it.
        key = (self.progress.step * self._num_micro_batches + micro_batch) % 2**31
        torch.manual_seed(config.seed * 2**31 + key)
        with self._throughput.waiting_for_data():
            inputs = net_setup.augmented_inputs(
                self._inputs, ids_B, self._worker, self._augmentation, self._stage
            )
            targets_B = torch.from_numpy(self._targets_N[ids_B]).to(device)
        mixed = self._augmentation.mix(inputs, targets_B, key)
        with self._autocast:
            outputs_BK = self._forward(*mixed.inputs).float()
        loss = self._criterion(outputs_BK, mixed.targets_B)
        if mixed.share < 1:
            other = self._criterion(outputs_BK, mixed.others_B)
            loss = mixed.share * loss + (1 - mixed.share) * other
        if self._teacher is not None:
            with self._autocast:
                loss = self._teacher.blended(loss, mixed.inputs, outputs_BK)
        return loss

    def _after_step(self) -> None:
        """Stop all workers if the loss diverged on any; save a checkpoint if one is due."""
        progress, config = self.progress, self._config
        ends_epoch = progress.step % self._steps_per_epoch == 0
        if progress.step % self._check_every != 0 and not ends_epoch:
            return
        every = config.checkpoint.every_steps
        waited_s = time.monotonic() - self._saved_at
        diverged, urgent, due = self._worker.any(
            not math.isfinite(self._loss_sum.item()),
            self._urgent(),
            # The clock of rank 0 decides for all workers.
            self._worker.rank == 0 and waited_s > config.checkpoint.every_minutes * 60,
        )
        if diverged:
            raise self._diverged("the loss is")
        due |= every is not None and progress.step % every < self._check_every
        if (due or urgent) and not ends_epoch:
            self._save()
            if urgent:
                self._settle()

    def _diverged(self, subject: str) -> Diverged:
        self._settle()
        optim, step = self._config.optim, self.progress.step
        factor = lr_schedule.lr_factor(optim, step - 1, self._total_steps)
        return Diverged(
            f"{subject} no longer finite at step {step} of {self._total_steps}, at rate "
            f"{optim.lr * factor:.3g}; lower optim.lr, now {optim.lr:g}. "
            "The last checkpoint is kept."
        )

    def _end_epoch(self, epoch: int) -> None:
        progress = self.progress
        loss_sum, num_samples = self._sums()
        metrics = self._validate()
        row = {
            "epoch": epoch + 1,
            "train_loss": loss_sum / num_samples,
            **metrics,
            **self._throughput.epoch_metrics(num_samples, progress.seconds),
        }
        self._loss_sum.zero_()
        progress.num_samples, progress.seconds = 0, 0.0
        if self._worker.rank == 0:
            progress.history.append(row)
            self._throughput.report("epoch", **row)
            # The later of equal epochs is better: its learning rate was lower.
            if (value := self._metric.signed(row)) >= progress.best:
                progress.best, progress.best_step = value, progress.step
            progress.stopped = self._is_stale()
        (progress.stopped,) = self._worker.any(progress.stopped)
        self._save()

    def _sums(self) -> list[float]:
        """Return the sum of the losses and the number of samples in this epoch so far.

        Both are of all workers.
        """
        return self._worker.sum([self._loss_sum.item(), self.progress.num_samples])

    def _is_stale(self) -> bool:
        """Return whether `stop.after` epochs are done, or `stop.patience` without improvement."""
        stop = self._config.stop
        if stop.after is not None:
            return len(self.progress.history) >= stop.after
        if stop.metric is None:
            return False
        metric = self._task.find_metric(stop.metric)
        values = [metric.signed(row) for row in self.progress.history]
        return len(values) - 1 - int(np.argmax(values)) >= stop.patience

    def _validate(self) -> dict[str, float]:
        """Return the metrics of the validation split on rank 0; empty on the others."""
        inputs, targets_N = self._valid
        self._net.eval()
        with averaged_weights(self._net, self._ema), self._autocast:
            outputs = evaluate.evaluate(self._net, inputs, self._worker)
        return {} if outputs is None else self._task.metrics(outputs, targets_N, "valid")

    def _save(self) -> None:
        """Start to write a checkpoint, after the previous one is finished.

        Raises Diverged if the state is not finite.
        """
        progress = self.progress
        loss_sum, num_samples = self._sums()
        tensors = collect_state(self._net, self._ema, self._optimizers)
        # The loss was computed before the last update, so it does not show if that overflowed.
        bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if any(self._worker.any(bool(bad))):
            named = f" '{bad[0].removeprefix('net.')}'" if bad else ""
            raise self._diverged(f"the weights{named} are")
        self._saved_at = time.monotonic()
        if self._worker.rank != 0:
            return
        self._settle()
        values = {
            **vars(progress),
            "loss_sum": loss_sum,
            "num_samples": int(num_samples),
            "scaler": self._scaler.state_dict(),
        }
        self._store.save(TrainingState(tensors, values), progress.best_step)

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written; report a failure and continue."""
        if error := self._store.settle():
            last = self._store.steps()[-1:]
            self._throughput.report("unwritten", error=str(error), last=last[0] if last else None)

    def _restore(self) -> None:
        """Load the last complete checkpoint, if there is one; the same on all workers."""
        latest = self._store.latest() if self._worker.rank == 0 else None
        # Rank 0 chooses the checkpoint; the other workers add 0 to the sum.
        (step,) = self._worker.sum([latest.values["step"] + 1 if latest is not None else 0])
        if step == 0:
            return
        found = latest or self._store.load(int(step) - 1)
        restore_state(self._net, self._ema, self._optimizers, found.tensors)
        values = dict(found.values)
        self._scaler.load_state_dict(values.pop("scaler"))
        loss_sum = values.pop("loss_sum")
        self.progress = Progress(**values)
        if self._worker.rank == 0:
            self._loss_sum += loss_sum
        else:  # rank 0 continues the saved sums, which are of all workers
            self.progress.num_samples = 0
