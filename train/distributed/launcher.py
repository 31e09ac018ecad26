"""Run the training loop on Ray Train, which restarts the workers when some are lost."""

import logging
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster import connect, ray_internals
from cluster.errors import CommandFailed, UserError
from cluster.nodes.run_on_nodes import nodes_without_storage
from train.config import Config, Workers, portable_options
from train.data.dataset import EncodedDataset
from train.distributed.elastic import CheckpointBeforeResize
from train.distributed.gloo import RayNetworkConfig
from train.distributed.in_process import LocalTorchTrainer
from train.distributed.ray_train_internals import TrainingFailedError
from train.distributed.waiting import LogWaitingOnce
from train.distributed.worker import worker_main
from train.loop.run_directory import NO_LESSON, DistillationConfig, Run, WorkerSpec
from train.telemetry.events import EventListener, until_failure
from train.telemetry.progress_bar import ProgressDisplay
from train.telemetry.prometheus import TrainingGauges
from train.telemetry.throughput import Event

# How often an elastic run checks whether the cluster has grown or shrunk.
RESIZE_EVERY_S = 10


def train(
    config: Config,
    run: Run,
    shards: EncodedDataset,
    *,
    observe: Callable[[Event], None] = lambda event: None,
    lesson: DistillationConfig = NO_LESSON,
) -> None:
    """Run the training loop on Ray Train; report to the terminal and to Prometheus.

    observe: called with every event of training, from another thread. Raises CommandFailed with the
    reason if training fails, UserError if the cluster or the storage is not suitable.
    """
    own = connect.is_local()
    room = _check(config, run, own=own)
    chosen = (config.stop.metric, config.checkpoint.metric, config.compress.metric)
    metrics = {"valid_loss", f"valid_{shards.task.metric}", *filter(None, chosen)}
    display = ProgressDisplay(config.stop.after or config.optim.epochs, metrics=metrics)
    gauges = TrainingGauges(run.name, config.checkpoint.every_minutes * 60)
    record = until_failure(observe)

    def show(event: Event) -> None:
        display.show(event)
        gauges.show(event)
        record(event)

    with display, gauges, EventListener(show) as follower:
        job = _job(config, run, shards, follower, lesson)
        _run(config, run, job, room, own=own)


def train_here(
    config: Config, run: Run, shards: EncodedDataset, observe: Callable[[Event], None]
) -> None:
    """Run the training loop on workers that end with this process; display nothing.

    In a placement group the workers use its bundles after the first. For `observe` and the errors
    see `train`.
    """
    room = _check(config, run, own=True)
    with EventListener(observe) as follower:
        _run(config, run, _job(config, run, shards, follower), room, own=True)


def _job(
    config: Config,
    run: Run,
    shards: EncodedDataset,
    follower: EventListener,
    lesson: DistillationConfig = NO_LESSON,
) -> WorkerSpec:
    owner = run.store(config.checkpoint.keep).hand_over()
    return WorkerSpec(
        config=portable_options(config),
        run_url=run.url,
        shards_url=shards.url,
        shards_summary=shards.summary,
        events=follower.events,
        owner=owner,
        lesson=lesson,
    )


class ClusterCapacity(NamedTuple):
    """Number of workers that the cluster can hold, and whether their resources are in use now."""

    workers: int
    is_taken: bool


def _check(config: Config, run: Run, *, own: bool) -> ClusterCapacity:
    """Return the cluster's capacity. Raises UserError without changing the run."""
    room = check_resources(config.workers)
    if not own:
        check_storage(run)
    return room


def _run(config: Config, run: Run, job: WorkerSpec, room: ClusterCapacity, *, own: bool) -> None:
    least, most = config.workers.num
    if own:  # this process has a fixed number of workers
        least = most = min(most, room.workers)
    kind = LocalTorchTrainer if own else TorchTrainer
    trainer = kind(
        worker_main,
        train_loop_config={"job": job},
        torch_config=RayNetworkConfig(),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=config.workers.gpu,
            resources_per_worker={"CPU": config.workers.cpus},
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
        ),
        run_config=RunConfig(
            # The loop writes its own checkpoints, so Ray's files are needed for this attempt only.
            name=f"ray-{time.time_ns():x}",
            storage_path=run.url,
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            callbacks=[CheckpointBeforeResize(run), LogWaitingOnce(said=room.is_taken)],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise CommandFailed(run.failure() or _reason(error, run)) from error
    if reason := run.failure():
        raise CommandFailed(reason)


def check_resources(workers: Workers) -> ClusterCapacity:
    """Return the cluster's capacity; report on stderr if the workers must wait for resources.

    Raises UserError if the cluster's nodes cannot hold the smallest number of workers.
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
    return ClusterCapacity(fit, is_taken)


def check_storage(run: Run) -> None:
    """Raise UserError, which names the nodes, if some nodes cannot access the run's directory."""
    if problems := nodes_without_storage(run.url, "run.json"):
        shown = "; ".join(f"node {address}: {problem}" for address, problem in problems.items())
        raise UserError(
            f"'{run.url}' must be accessible from every node, and is not ({shown}). "
            "Give a --storage.path in a shared file system, or a URL such as s3://…"
        )


def _reason(error: TrainingFailedError, run: Run) -> str:
    failures = getattr(error, "worker_failures", {})
    first = next(iter(failures.values()), error)
    logging.getLogger(__name__).debug("workers failed", exc_info=error)
    lines = [line for line in str(first).splitlines() if line.strip()]
    if lines and "Superseded" in lines[-1]:
        return f"another command continues the run {run.name}; this command ends."
    return (
        f"training failed: {lines[-1] if lines else type(first).__name__}. Continue with "
        f"--resume {run.name}; Ray's logs are in {ray_internals.session_log_folder()}."
    )
