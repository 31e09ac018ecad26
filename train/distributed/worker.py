"""The function of a Ray Train worker: run the loop from the run's last checkpoint."""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ray.train.torch
import torch

from cluster import ray_internals, storage
from train.config import Config, allow_plugins
from train.data import batch_sampler
from train.data.dataset import EncodedDataset
from train.distributed.ray_train_internals import preemption_notice
from train.loop.checkpoint import Superseded
from train.loop.loop import Diverged, Loop
from train.loop.parallelism import Worker
from train.loop.run_directory import LEAST_SAMPLES, Run, WorkerSpec
from train.values.ragged import lengths_of

# Errors of code or data, which a retry would raise again. Other errors may be caused by a lost
# worker.
DETERMINISTIC = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(NotImplementedError, SyntaxError, TypeError, ValueError),
)

# How often a worker checks for a requested checkpoint; at a URL each check is an HTTP request.
LOOK_EVERY_S = 0.5


def worker_main(parameters: dict[str, Any]) -> None:
    """Train to the end, as one of the workers that Ray Train starts."""
    # Ray Train logs each of its own steps, but the terminal is for the progress of the run.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    job: WorkerSpec = parameters["job"]
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    if worker.device.type == "cpu":
        torch.set_num_threads(max(1, int(job.config["workers"]["cpus"])))
    run = Run.open(job.run_url)
    if run.failed():  # an earlier worker recorded the failure, and Ray retries
        return
    run_loop(job, run, worker, urgent=CheckpointTrigger(run, worker))


def run_loop(job: WorkerSpec, run: Run, worker: Worker, **options: Any) -> None:
    """Run the training loop. A failure that a retry would only repeat is recorded with the run.

    options: of Loop. Raises torch.OutOfMemoryError after halving the micro-batches for the next
    attempt, and Superseded if other processes continue the run.
    """
    config = Config.model_validate(job.config)
    allow_plugins(config)
    shards = EncodedDataset(job.shards_url, job.shards_summary)
    tracing: Any = nullcontext(lambda: None)
    if config.profile and worker.rank == 0:
        # Imported only where it is used, because the import takes a second.
        from train.telemetry import profiler

        url = storage.join_path(run.url, "trace")
        job.events.send({"event": "tracing", "url": url})
        tracing = profiler.profile_steps(url, worker.device)

    def written(step: int) -> None:
        job.events.send({"event": "checkpoint", "step": step})

    store = run.store(config.checkpoint.keep, written)
    try:
        if worker.rank == 0:
            store.claim(job.owner)
        with tracing as after_step:
            Loop(
                config,
                shards,
                worker,
                store,
                num_micro_batches=run.num_micro_batches,
                observe=job.events.send,
                after_step=after_step,
                lesson=job.lesson,
                **options,
            ).run()
    except Superseded as error:
        # Ray may no longer reach this process, so the reason is also printed to the worker's log.
        print(f"{run.name}: {error}", file=sys.stderr, flush=True)
        raise
    except Diverged as error:
        if worker.rank == 0:
            run.fail(str(error))
    except torch.OutOfMemoryError:
        _halve(run, config, shards, job.events.send)
        raise
    except DETERMINISTIC as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        run.fail(
            f"training failed and would fail again: {type(error).__name__}: {reason}. Fix the "
            f"cause, then continue with --resume {run.name}; the traceback is above and in Ray's "
            f"logs in {ray_internals.session_log_folder()}."
        )
        raise


def _halve(run: Run, config: Config, shards: EncodedDataset, observe: Callable[..., None]) -> None:
    """Halve the micro-batches for the next attempt; record a failure if they are too small."""
    inputs, targets_N = shards.open("train")
    smallest = batch_sampler.smallest_batch(
        len(targets_N), config.optim.batch_size, lengths_of(inputs), config.optim.batch_by
    )
    if 2 * run.num_micro_batches * LEAST_SAMPLES > smallest:
        run.fail(
            f"GPU memory does not hold the net and {LEAST_SAMPLES} samples; "
            f"make the net or the inputs smaller."
        )
        return
    run.halve_micro_batches()
    observe({"event": "halved", "micro_batch": -(-smallest // (2 * run.num_micro_batches))})


class CheckpointTrigger:
    """Returns whether to write a checkpoint now, before a machine is removed or at a resize."""

    def __init__(self, run: Run, worker: Worker) -> None:
        self._run = run
        self._looks = worker.rank == 0
        self._looked_at = 0.0
        self._notice: object = None

    def __call__(self) -> bool:
        # Not ray.train.get_preemption_info, which waits for all workers through another process.
        # The loop itself makes all workers write the checkpoint at the same step.
        notice = preemption_notice()
        noticed = notice is not None and notice != self._notice
        self._notice = notice
        if not self._looks or time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return noticed
        self._looked_at = time.monotonic()
        return self._run.checkpoint_wanted(forget=True) or noticed
