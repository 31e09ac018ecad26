"""What every Ray Train worker runs: the loop, from the run's last checkpoint on."""

import logging
import time
from typing import Any

import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context

from train.config import Config
from train.data.shards import Shards
from train.loop.loop import Diverged, Loop
from train.loop.parallel import Worker
from train.loop.run import Job, Run

# How often a worker looks whether a checkpoint is wanted, where looking may be a request.
LOOK_EVERY_S = 0.5


def work(parameters: dict[str, Any]) -> None:
    """Train to the end. A failure that another try would only repeat is left as a note."""
    job: Job = parameters["job"]
    # Ray Train records each of its own steps; the terminal is for the run's progress.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    config = Config.model_validate(job.config)
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    if worker.device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    run = Run(job.run_url, job.config, job.num_lanes)
    try:
        Loop(
            config,
            Shards(job.shards_url, job.shards_summary),
            worker,
            run.store(config.checkpoint.keep),
            num_lanes=job.num_lanes,
            observe=job.events.send,
            urgent=Urgency(run, worker),
        ).run()
    except Diverged as error:
        if worker.rank == 0:
            run.fail(str(error))


class Urgency:
    """Whether a checkpoint is wanted now: a machine will be taken away, or a resize is coming."""

    def __init__(self, run: Run, worker: Worker) -> None:
        self._run = run
        self._looks = worker.rank == 0
        self._looked_at = 0.0
        self._notice: object = None

    def __call__(self) -> bool:
        # Not ray.train.get_preemption_info, which is a barrier through another process: the loop
        # brings the workers to agree at the same step itself.
        notice = get_train_context().preemption_context.preemption_info
        noticed = notice is not None and notice != self._notice
        self._notice = notice
        if not self._looks or time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return noticed
        self._looked_at = time.monotonic()
        return self._run.checkpoint_wanted(forget=True) or noticed
