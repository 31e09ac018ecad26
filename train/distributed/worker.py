"""What every Ray Train worker runs: the loop, from the run's last checkpoint on."""

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

# Errors of code or data, which the same step raises again. Others may come from a worker that died.
DETERMINISTIC = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(NotImplementedError, SyntaxError, TypeError, ValueError),
)

# How often a worker looks whether a checkpoint is wanted, where looking may be a request.
LOOK_EVERY_S = 0.5


def worker_main(parameters: dict[str, Any]) -> None:
    """Train to the end, as one of the workers that Ray Train started."""
    # Ray Train records each of its own steps; the terminal is for the run's progress.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    job: WorkerSpec = parameters["job"]
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    if worker.device.type == "cpu":
        torch.set_num_threads(max(1, int(job.config["workers"]["cpus"])))
    run = Run.open(job.run_url)
    if run.failed():  # by a worker before, and Ray tries again
        return
    run_loop(job, run, worker, urgent=CheckpointTrigger(run, worker))


def run_loop(job: WorkerSpec, run: Run, worker: Worker, **options: Any) -> None:
    """Run the loop. A failure that another try would only repeat is left as a note.

    options: for the loop. Raises torch.OutOfMemoryError where another try will be with half the
    samples at once, Superseded where others continue the run.
    """
    config = Config.model_validate(job.config)
    allow_plugins(config)
    shards = EncodedDataset(job.shards_url, job.shards_summary)
    tracing: Any = nullcontext(lambda: None)
    if config.profile and worker.rank == 0:
        # Imported only where it is used: it takes a second.
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
        # Ray may no longer reach this process; its log stays on this machine.
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
            f"training failed, and would again: {type(error).__name__}: {reason}. Continue it with "
            f"--resume {run.name} once that is mended; the traceback is above, and in Ray's logs "
            f"under {ray_internals.session_log_folder()}."
        )
        raise


def _halve(run: Run, config: Config, shards: EncodedDataset, observe: Callable[..., None]) -> None:
    """Ask for another try with half the samples at once, if they can be halved."""
    num_samples = len(shards.open("train")[1])
    smallest = batch_sampler.smallest_batch(num_samples, config.optim.batch_size)
    if 2 * run.num_micro_batches * LEAST_SAMPLES > smallest:
        run.fail(
            f"the GPU's memory does not hold the net and {LEAST_SAMPLES} samples; "
            f"make the net or the inputs smaller."
        )
        return
    run.halve_micro_batches()
    observe({"event": "halved", "micro_batch": -(-smallest // (2 * run.num_micro_batches))})


class CheckpointTrigger:
    """Whether a checkpoint is wanted now: a machine will be taken away, or a resize is coming."""

    def __init__(self, run: Run, worker: Worker) -> None:
        self._run = run
        self._looks = worker.rank == 0
        self._looked_at = 0.0
        self._notice: object = None

    def __call__(self) -> bool:
        # Not ray.train.get_preemption_info, which is a barrier through another process: the loop
        # brings the workers to agree at the same step itself.
        notice = preemption_notice()
        noticed = notice is not None and notice != self._notice
        self._notice = notice
        if not self._looks or time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return noticed
        self._looked_at = time.monotonic()
        return self._run.checkpoint_wanted(forget=True) or noticed
