"""A trial in its Ray Tune process, which trains itself or starts workers that train."""

import contextlib
import io
import os
import queue
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from cluster.errors import CommandFailed, UserError
from train.bundle import BundleWriter
from train.config import Compress, Config, allow_plugins, validate_config
from train.data import batch_sampler, dataset
from train.data.dataset import EncodedDataset
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Diverged, Loop
from train.loop.net_setup import build_net, load_trained
from train.loop.parallelism import Worker
from train.loop.run_directory import Run
from train.pretrained.backbone import attach_backbone
from train.tasks import Metric
from train.telemetry.throughput import Event
from tune.objectives import variant_metrics

# Seconds for measuring the latencies of a trial's variants.
MEASURE_S = 1.0
MARK = "run.txt"
# End of the training loop's error messages, cut off because a failed trial is not continued.
KEPT = " The last checkpoint is kept."
# Seconds that a run waits for the checkpoint, of another run, from which it continues.
CHECKPOINT_WAIT_S = 20


@dataclass(frozen=True)
class TrialSpec:
    """The message to a trial's process, with plain values only.

    config: the training config, with the trial's options. run_url: path or URL of the trial's run,
    which may not exist yet. reported: the last epoch that the study has stored. early: the fields
    of the metric by which running trials are compared. variants: those to make and measure at the
    end. source_url, source_epoch: the run and its epoch from which a new run continues. folder: the
    directory from which the study was started, where relative paths of data begin.
    """

    number: int
    config: dict[str, Any]
    run_url: str
    reported: int
    early: dict[str, Any]
    variants: tuple[str, ...] = ()
    source_url: str | None = None
    source_epoch: int = 0
    folder: str = "."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


class TrialProcess(tune.Trainable):
    """A trial for Ray Tune. Each step is an epoch; the last step measures the variants.

    The run stores its own checkpoints. A checkpoint for Ray holds only the path of the run.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._plan = TrialSpec(**config)
        with contextlib.suppress(FileNotFoundError):  # on another machine
            os.chdir(self._plan.folder)
        self._results = trial_results(self._plan)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._results.close()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return next(self._results)
        except (Diverged, UserError, CommandFailed, ValueError) as error:  # with clear messages
            return {"failed": str(error).removesuffix(KEPT), "done": True}
        except torch.OutOfMemoryError:
            return {"failed": "the GPU ran out of memory", "done": True}
        except Exception as error:  # the user's own task or network can raise any kind
            line = " ".join(str(error).split())[:300]
            return {"failed": f"{type(error).__name__}: {line}", "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, MARK).write_text(self._plan.run_url)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Do nothing: the trial's spec says where the run continues."""

    def cleanup(self) -> None:
        self._results.close()


def trial_results(plan: TrialSpec) -> Generator[dict[str, Any]]:
    """Yield each epoch's figures, then the figures of the variants with `done` set.

    Raises the errors of training.
    """
    config = validate_config(plan.config)
    allow_plugins(config)
    root = config.storage.root
    data = attach_backbone(config, dataset.prepare_dataset(config, root))
    run = _run(plan, config, data)
    rows = _here(config, data, run) if config.workers.most == 1 else _on_workers(config, data, run)
    for row in rows:
        if row["epoch"] > plan.reported:
            value = Metric(**plan.early).signed(row)
            yield {"epoch": int(row["epoch"]), "figures": row, "value": value}
    served = measure_variants(plan, config, data, run, root) if plan.variants else {}
    yield {"served": served, "done": True}


def _run(plan: TrialSpec, config: Config, data: EncodedDataset) -> Run:
    """Return the trial's existing run, or a new one, which may start from another's checkpoint."""
    try:
        return Run.open(plan.run_url)
    except FileNotFoundError:
        if plan.source_url is not None:
            num_records = data.summary["splits"]["train"]["num_records"]
            step = plan.source_epoch * batch_sampler.num_steps(num_records, config.optim.batch_size)
            source = Run.open(plan.source_url).store(config.checkpoint.keep)
            # The source's process may still be writing the checkpoint. If it was killed first, the
            # checkpoint never appears.
            deadline = time.monotonic() + CHECKPOINT_WAIT_S
            while step not in (steps := source.steps()) and time.monotonic() < deadline:
                time.sleep(0.05)
            there = [each for each in steps if each <= step]
            _store(plan.run_url, config).adopt(source, there[-1] if there else step)
        return Run.start(plan.run_url, config)


def _store(run_url: str, config: Config) -> CheckpointManager:
    return Run(run_url, {}, 1).store(config.checkpoint.keep)


def _here(config: Config, data: EncodedDataset, run: Run) -> Iterator[Event]:
    """Train in this process, which computes all micro-batches; yield the figures of each epoch."""
    device = torch.device("cuda" if config.workers.gpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    store = run.store(config.checkpoint.keep)
    store.claim(store.hand_over())
    loop = Loop(config, data, Worker(0, 1, device), store, num_micro_batches=run.num_micro_batches)
    yield from loop.progress.history
    for _ in loop.epochs():
        yield loop.progress.history[-1]


def _on_workers(config: Config, data: EncodedDataset, run: Run) -> Iterator[Event]:
    """Train on Ray Train's workers; yield the figures of each epoch.

    The workers belong to this process and end with it.
    """
    last = _store(run.url, config).latest()
    yield from last.values["history"] if last is not None else []
    rows: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

    def observe(event: Event) -> None:
        if event["event"] == "epoch":
            rows.put({key: value for key, value in event.items() if key != "event"})

    def work() -> None:
        from train.distributed import launcher

        try:
            launcher.train_here(config, run, data, observe)
            rows.put(None)
        except BaseException as error:
            rows.put(error)

    threading.Thread(target=work, name="training", daemon=True).start()
    while (row := rows.get()) is not None:
        if isinstance(row, BaseException):
            raise row
        yield row


def measure_variants(
    plan: TrialSpec, config: Config, data: EncodedDataset, run: Run, root: str
) -> dict[str, dict[str, Any]]:
    """Make the variants of a run's model in a temporary folder; return their figures by variant.

    The variants are not trained further. An int8 variant that needs training may therefore be
    better in the winner's bundle. Raises CommandFailed if a variant cannot be made.
    """
    # Imported here, because the import takes seconds.
    from train.compress import compress

    options = config.compress.model_dump() | {
        "variants": plan.variants,
        "qat_epochs": 0,
        "measure_seconds": MEASURE_S,
    }
    config = config.model_copy(update={"compress": Compress.model_validate(options)})
    net = build_net(config, data.task)
    load_trained(net, load_best_weights(run.store(config.checkpoint.keep))[0], data)
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        made = compress(net, config, data, BundleWriter(Path(folder)), root)
    missing = [name for name in plan.variants if name not in made.variants]
    if missing:
        raise CommandFailed(f"{missing[0]} could not be made: {made.skipped[missing[0]]}")
    return {name: variant_metrics(made.variants[name]) for name in plan.variants}
