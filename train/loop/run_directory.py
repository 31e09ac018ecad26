"""A run's directory: its config, its checkpoints, and messages between its processes.

The directory `<storage>/train/<run>/` contains `run.json`, `checkpoints/`, `outcome.json` if
training failed, and `checkpoint-wanted` while a resize waits for a checkpoint.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster import commit, storage
from cluster.errors import UserError
from train.bundle.manifest import flatten_options
from train.config import Config
from train.telemetry.events import EventSender

if TYPE_CHECKING:
    from train.loop.checkpoint import CheckpointManager

# Fewest samples of a micro-batch, because a batch norm needs more than one.
LEAST_SAMPLES = 2

# Options that may differ when a run is resumed, because they do not change the trained weights.
MAY_CHANGE = (
    "workers.num",
    "workers.gpu",
    "workers.max_failures",
    "checkpoint.every_minutes",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "compress",
    "plugins",
    "profile",
    "registry",
    "resume",
    "storage",
)


@dataclass(frozen=True)
class Run:
    """A run: the URL of its directory, its config, and its number of micro-batches."""

    url: str
    config: dict[str, Any]
    num_micro_batches: int

    @classmethod
    def start(cls, url: str, config: Config) -> "Run":
        """Write the directory of a new run. Raises UserError if it cannot be written."""
        run = cls(url, config.model_dump(mode="json"), cls.count_micro_batches(config))
        with storage.storage_errors(url):
            run._keep()
        return run

    @classmethod
    def open(cls, url: str) -> "Run":
        """Read a run. Raises FileNotFoundError if it does not exist."""
        fs, path = storage.filesystem(storage.join_path(url, "run.json"))
        with fs.open(path) as file:
            return cls(**json.load(file))

    @staticmethod
    def count_micro_batches(config: Config) -> int:
        """Return the number of parts into which a run with this config divides global batches."""
        return config.workers.micro_batches or config.workers.most

    @classmethod
    def find(cls, parent: str, name: str) -> "Run":
        """Read a run by its name. Raises UserError if it does not exist."""
        url = storage.join_path(parent, name)
        if not storage.exists(storage.join_path(url, "run.json")):
            raise UserError(
                f"there is no run '{name}' to resume; "
                f"existing runs: {', '.join(storage.list_names(parent)[-5:]) or 'none'}."
            )
        return cls.open(url)

    @classmethod
    def resume(cls, url: str, config: Config) -> "Run":
        """Read a run that stopped, and clear the record of its failure.

        Raises UserError if the run does not exist, or if `config` differs from the run's config in
        an option that may not change. The message names the options.
        """
        run = cls.find(*url.rsplit("/", 1))
        differing = config_differences(run.config, config.model_dump(mode="json"), MAY_CHANGE)
        if differing:
            raise UserError(
                f"a resumed run keeps its config, but {differing}. "
                f"Only {', '.join(MAY_CHANGE[:-2])} may change."
            )
        if config.workers.most > run.num_micro_batches:
            raise UserError(
                f"workers.num is {config.workers.most}, and the run has only "
                f"{run.num_micro_batches} micro-batches, of which every worker needs one; give "
                f"--workers.num {run.num_micro_batches} or less."
            )
        run.failure()
        return run

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def store(
        self, keep: int, written: Callable[[int], None] = lambda step: None
    ) -> "CheckpointManager":
        """Return the manager of the run's checkpoints; see there for `keep` and `written`."""
        from train.loop.checkpoint import CheckpointManager

        return CheckpointManager(storage.join_path(self.url, "checkpoints"), keep, written)

    def halve_micro_batches(self) -> "Run":
        """Double the number of micro-batches from the next start of the workers on.

        Each micro-batch then has half the samples. One or several workers may call this: all of
        them write the same number.
        """
        run = replace(self, num_micro_batches=2 * self.num_micro_batches)
        run._keep()
        return run

    def fail(self, reason: str) -> None:
        """Record that the run cannot continue, and why."""
        self.write("outcome.json", {"failed": reason})

    def failed(self) -> bool:
        """Return whether a failure is recorded."""
        return storage.exists(storage.join_path(self.url, "outcome.json"))

    def failure(self) -> str | None:
        """Return the recorded reason of a failure and delete the record; None if there is none."""
        url = storage.join_path(self.url, "outcome.json")
        content = storage.read_file(url)
        if content is None:
            return None
        storage.remove(url)
        reason: str = json.loads(content)["failed"]
        return reason

    def want_checkpoint(self) -> None:
        """Request a checkpoint from the workers."""
        self.write("checkpoint-wanted", {})

    def checkpoint_wanted(self, *, forget: bool = False) -> bool:
        """Return whether a checkpoint is requested. forget: delete the request."""
        url = storage.join_path(self.url, "checkpoint-wanted")
        wanted = storage.exists(url)
        if wanted and forget:
            storage.remove(url)
        return wanted

    def read(self, name: str) -> Any:
        """Return the JSON value that was written under a name; None if there is none."""
        content = storage.read_file(storage.join_path(self.url, name))
        return None if content is None else json.loads(content)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON value under a name in the run's directory."""
        commit.write_atomic(storage.join_path(self.url, name), json.dumps(value).encode())

    def _keep(self) -> None:
        self.write("run.json", asdict(self))


@dataclass(frozen=True)
class DistillationConfig:
    """Sources of learning in addition to the records.

    start: URL of the initial weights, to whose shapes the network is resized.
    teacher: URL of the weights of a teacher. teacher_net: options of the teacher's net.
    teacher_fraction: share of the loss. temperature: of the teacher's probabilities.
    quantized: round weights and activations as in int8.
    """

    start: str | None = None
    teacher: str | None = None
    teacher_net: dict[str, Any] | None = None
    teacher_fraction: float = 0.0
    temperature: float = 1.0
    quantized: bool = False


NO_LESSON = DistillationConfig()


@dataclass(frozen=True)
class WorkerSpec:
    """The job that is sent to the workers: plain values, and where to send events.

    owner: id with which the workers claim the run's checkpoints; see `CheckpointManager`.

    Ray Train's controller unpickles it, too, so this module does not import torch.
    """

    config: dict[str, Any]
    run_url: str
    shards_url: str
    shards_summary: dict[str, Any]
    events: EventSender
    owner: str
    lesson: DistillationConfig = NO_LESSON


def config_differences(old: dict[str, Any], new: dict[str, Any], may: Sequence[str]) -> str:
    """Return a line with the differences of two configs, except in options that `may` differ.

    It is empty if there are no differences.
    """
    before, after = flatten_options(old), flatten_options(new)
    return "; ".join(
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in may)
    )
