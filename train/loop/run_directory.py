"""A run's directory: its config, its checkpoints, and notes between driver, controller, workers.

`<storage>/train/<run>/run.json`, `checkpoints/`, `outcome.json`; while a resize waits for a
checkpoint, `checkpoint-wanted`.
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

# Samples in a micro-batch: a batch norm has nothing to learn from a single one.
LEAST_SAMPLES = 2

# What may differ when a run is resumed: none of it changes what is learned.
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
    """Where a run is kept, and what of it never changes."""

    url: str
    config: dict[str, Any]
    num_micro_batches: int

    @classmethod
    def start(cls, url: str, config: Config) -> "Run":
        """Write down a new run."""
        run = cls(url, config.model_dump(mode="json"), cls.count_micro_batches(config))
        with storage.storage_errors(url):
            run._keep()
        return run

    @classmethod
    def open(cls, url: str) -> "Run":
        """Raises FileNotFoundError if there is none."""
        fs, path = storage.filesystem(storage.join_path(url, "run.json"))
        with fs.open(path) as file:
            return cls(**json.load(file))

    @staticmethod
    def count_micro_batches(config: Config) -> int:
        """How many parts a run with this config divides its global batches into."""
        return config.workers.micro_batches or config.workers.most

    @classmethod
    def find(cls, parent: str, name: str) -> "Run":
        """Read a run by its name. Raises UserError if it is not there."""
        url = storage.join_path(parent, name)
        if not storage.exists(storage.join_path(url, "run.json")):
            raise UserError(
                f"there is no run '{name}' to resume; "
                f"there are {', '.join(storage.list_names(parent)[-5:]) or 'none'}."
            )
        return cls.open(url)

    @classmethod
    def resume(cls, url: str, config: Config) -> "Run":
        """Read a run that stopped.

        Raises UserError if it is not there, or names what differs in `config` and may not.
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
                f"the run has {run.num_micro_batches} micro-batches, so at most as many workers; "
                f"workers.num is {config.workers.most}."
            )
        run.failure()
        return run

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def store(
        self, keep: int, written: Callable[[int], None] = lambda step: None
    ) -> "CheckpointManager":
        from train.loop.checkpoint import CheckpointManager

        return CheckpointManager(storage.join_path(self.url, "checkpoints"), keep, written)

    def halve_micro_batches(self) -> "Run":
        """Have twice as many micro-batches, each of half the samples, when the workers start again.

        Any of them may ask, or all of them.
        """
        run = replace(self, num_micro_batches=2 * self.num_micro_batches)
        run._keep()
        return run

    def fail(self, reason: str) -> None:
        """Leave word that the run cannot go on, and why."""
        self.write("outcome.json", {"failed": reason})

    def failed(self) -> bool:
        return storage.exists(storage.join_path(self.url, "outcome.json"))

    def failure(self) -> str | None:
        """What `fail` was told; forgotten afterwards."""
        url = storage.join_path(self.url, "outcome.json")
        content = storage.read_file(url)
        if content is None:
            return None
        storage.remove(url)
        reason: str = json.loads(content)["failed"]
        return reason

    def want_checkpoint(self) -> None:
        self.write("checkpoint-wanted", {})

    def checkpoint_wanted(self, *, forget: bool = False) -> bool:
        url = storage.join_path(self.url, "checkpoint-wanted")
        wanted = storage.exists(url)
        if wanted and forget:
            storage.remove(url)
        return wanted

    def read(self, name: str) -> Any:
        """What was written under a name; None if nothing was."""
        content = storage.read_file(storage.join_path(self.url, name))
        return None if content is None else json.loads(content)

    def write(self, name: str, value: Any) -> None:
        """Keep a JSON value with the run."""
        commit.write_atomic(storage.join_path(self.url, name), json.dumps(value).encode())

    def _keep(self) -> None:
        self.write("run.json", asdict(self))


@dataclass(frozen=True)
class DistillationConfig:
    """What a net learns from besides the records.

    start: URL of the weights to start from, whose shapes it takes.
    teacher: URL of the weights of a net whose outputs are learned; teacher_net: its net's config.
    teacher_fraction: of the loss. temperature: of its probabilities.
    quantized: compute weights and activations as int8 will.
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
    """What the workers are sent: plain values, and where to send events.

    owner: of the run's checkpoints, which a later command may take over.

    Ray Train's controller reads it too, so its module imports no torch.
    """

    config: dict[str, Any]
    run_url: str
    shards_url: str
    shards_summary: dict[str, Any]
    events: EventSender
    owner: str
    lesson: DistillationConfig = NO_LESSON


def config_differences(old: dict[str, Any], new: dict[str, Any], may: Sequence[str]) -> str:
    """Say in what a config differs from an old one besides the options that may; "" if in none."""
    before, after = flatten_options(old), flatten_options(new)
    return "; ".join(
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in may)
    )
