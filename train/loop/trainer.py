"""Ray Train around the loop: start the workers, and start them again when some are lost."""

import logging
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster import connect
from cluster.ask import unreachable
from cluster.errors import Failed, UserError
from train.config import Config, Workers
from train.data.shards import Shards
from train.loop.events import Follower, until_it_fails
from train.loop.figures import Event
from train.loop.gauges import Gauges
from train.loop.interface import OverRaysNetwork
from train.loop.local import LocalTorchTrainer
from train.loop.progress import ProgressDisplay
from train.loop.resize import CheckpointBeforeResize
from train.loop.run import NO_LESSON, Job, Lesson, Run
from train.loop.waiting import SayWaitingOnce
from train.loop.worker import work

# How often an elastic run looks whether the cluster has grown or shrunk.
RESIZE_EVERY_S = 10


def train(
    config: Config,
    run: Run,
    shards: Shards,
    *,
    observe: Callable[[Event], None] = lambda event: None,
    lesson: Lesson = NO_LESSON,
) -> None:
    """Run the loop on Ray Train, shown on the terminal and to Prometheus.

    observe: told of every event of training besides the terminal, from another thread.
    Raises Failed with the reason, UserError if nothing fits.
    """
    own = connect.is_local()
    room = _check(config, run, own=own)
    display = ProgressDisplay(config.optim.epochs)
    gauges = Gauges(run.name, config.checkpoint.every_minutes * 60)
    record = until_it_fails(observe)

    def show(event: Event) -> None:
        display.show(event)
        gauges.show(event)
        record(event)

    with display, gauges, Follower(show) as follower:
        job = _job(config, run, shards, follower, lesson)
        _run(config, run, job, room, own=own)


def train_here(config: Config, run: Run, shards: Shards, observe: Callable[[Event], None]) -> None:
    """Run the loop on workers that are this process's own and end with it; show nothing.

    In a placement group they take its bundles after the first. For `observe` see `train`.
    """
    room = _check(config, run, own=True)
    with Follower(observe) as follower:
        _run(config, run, _job(config, run, shards, follower), room, own=True)


def _job(
    config: Config, run: Run, shards: Shards, follower: Follower, lesson: Lesson = NO_LESSON
) -> Job:
    values = config.model_dump(mode="json")
    owner = run.store(config.checkpoint.keep).hand_over()
    return Job(values, run.url, shards.url, shards.summary, follower.events, owner, lesson)


class Room(NamedTuple):
    """How many workers the cluster can hold, and whether others hold their places now."""

    workers: int
    is_taken: bool


def _check(config: Config, run: Run, *, own: bool) -> Room:
    """Return the cluster's room for workers. Raises UserError, and the run is untouched."""
    room = check_resources(config.workers)
    if not own:
        check_storage(run)
    return room


def _run(config: Config, run: Run, job: Job, room: Room, *, own: bool) -> None:
    least, most = config.workers.num
    if own:  # which neither grow nor shrink
        least = most = min(most, room.workers)
    kind = LocalTorchTrainer if own else TorchTrainer
    trainer = kind(
        work,
        train_loop_config={"job": job},
        torch_config=OverRaysNetwork(),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=config.workers.gpu,
            resources_per_worker={"CPU": config.workers.cpus},
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
        ),
        run_config=RunConfig(
            # The loop keeps its own checkpoints; what Ray keeps is of this attempt only.
            name=f"ray-{time.time_ns():x}",
            storage_path=run.url,
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            callbacks=[CheckpointBeforeResize(run), SayWaitingOnce(said=room.is_taken)],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise Failed(run.failure() or _reason(error, run)) from error
    if reason := run.failure():
        raise Failed(reason)


def check_resources(workers: Workers) -> Room:
    """Return how many workers the cluster can hold; say on stderr if there is no room now.

    Raises UserError at once where it could never hold the fewest.
    """
    least = workers.num[0]
    per_worker = {"CPU": workers.cpus, **({"GPU": 1.0} if workers.gpu else {})}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = sum(
        min(int(node.get(name, 0) // amount) for name, amount in per_worker.items())
        for node in nodes
    )
    words = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    if fit < least:
        has = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        raise UserError(
            f"workers.num is {least}, each with {words}; the cluster has {has['CPU']:g} CPU and "
            f"{has['GPU']:g} GPU on {len(nodes)} nodes, enough for {fit}. "
            f"Give --workers.num {max(fit, 1)} or add nodes."
        )
    free = ray.available_resources()
    is_taken = any(free.get(name, 0) < least * amount for name, amount in per_worker.items())
    if is_taken:
        shown = ", ".join(f"{free.get(name, 0):g} {name}" for name in per_worker)
        print(f"waiting for {least} workers, each with {words}; free now: {shown}", file=sys.stderr)
    return Room(fit, is_taken)


def check_storage(run: Run) -> None:
    """Raises UserError, naming the nodes, where some do not reach the run's directory."""
    if problems := unreachable(run.url, "run.json"):
        shown = "; ".join(f"node {address}: {problem}" for address, problem in problems.items())
        raise UserError(
            f"'{run.url}' must be reached by every node, and is not ({shown}). "
            "Give a --storage.path that is: a shared file system, or a URL such as s3://…"
        )


def _reason(error: TrainingFailedError, run: Run) -> str:
    failures = getattr(error, "worker_failures", {})
    first = next(iter(failures.values()), error)
    logging.getLogger(__name__).debug("workers failed", exc_info=error)
    lines = [line for line in str(first).splitlines() if line.strip()]
    if lines and "Superseded" in lines[-1]:
        return f"{run.name} is continued by another command; this one ends."
    return (
        f"training failed: {lines[-1] if lines else type(first).__name__}. Continue it with "
        f"--resume {run.name}; Ray's logs are under {connect.logs()}."
    )
