"""The files of a study: one for the study itself, and one for each trial.

`<storage>/studies/<name>/study.json`, `trials/00007.json`, `runs/00007/` (the trial's run, with its
checkpoints), `report/`, `best.yaml`, `result.json`. The driver, of which there is one at a time,
rewrites a trial's file atomically at each of its reports. The state of the sampler and scheduler is
rebuilt from these files, so the driver may be killed at any moment; no pickle is ever read.
"""

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster import commit, storage
from cluster.errors import UserError
from train.config import validate_as
from train.loop.run_directory import config_differences
from train.metrics import best_epoch
from train.tasks import Metric
from tune import objectives
from tune.config import StudyConfig
from tune.run.trial_record import EpochReport, Exploit, State, Trial

STUDY, TRIALS, RUNS, RESULT, BEST, REPORT = (
    *("study.json", "trials", "runs"),
    *("result.json", "best.yaml", "report"),
)

# Prefix of the folders in which Ray Tune stores its own files, which are not read.
RAY = "ray-"

# Options that may change when a study is continued, because they do not affect trials' results.
MAY_CHANGE = (
    *("tune.num_trials", "tune.parallel", "tune.max_minutes", "tune.pick", "tune.refit"),
    *("workers.gpu", "workers.max_failures", "checkpoint.keep", "profile", "registry", "storage"),
)


class Study:
    """The trials of a study and their files. One process writes; any process may read.

    known: the metrics of the task, the main one first. choice: the metric that selects the best
    epoch of a run.
    """

    def __init__(
        self,
        url: str,
        config: StudyConfig,
        known: Sequence[Metric],
        choice: Metric,
        trials: Sequence[Trial] = (),
    ) -> None:
        self.url, self.config, self.choice, self.trials = url, config, choice, list(trials)
        self.goals = objectives.study_goals(config.tune.objectives, config.tune.pick, known)
        self._reported = sum(len(trial.reports) for trial in trials)

    @classmethod
    def load(cls, url: str) -> "Study":
        """Return the study stored at a path or URL.

        Raises UserError if there is none, or if one of its files is invalid.
        """
        content = storage.read_file(storage.join_path(url, STUDY))
        if content is None:
            parent, name = url.rsplit("/", 1)
            known = ", ".join(storage.list_names(parent))
            raise UserError(f"there is no study '{name}'; existing studies: {known or 'none'}.")
        found = json.loads(content)
        folder = storage.join_path(url, TRIALS)
        trials = []
        for name in storage.list_names(folder):
            trial = storage.read_file(storage.join_path(folder, name))
            if name.endswith(".json") and trial is not None:
                try:
                    trials.append(Trial.model_validate_json(trial))
                except ValidationError as error:
                    raise UserError(
                        f"'{name}' is not a trial's file of this version; give another "
                        "--tune.study."
                    ) from error
        config = validate_as(StudyConfig, found["config"])
        if "metrics" not in found:
            raise UserError(
                f"study '{_name(url)}' is from an earlier version; give another --tune.study."
            )
        metrics = [Metric(**each) for each in found["metrics"]]
        return cls(url, config, metrics, Metric(**found["choice"]), trials)

    @classmethod
    def open(
        cls,
        url: str,
        config: StudyConfig,
        known: Sequence[Metric],
        choice: Metric,
        data: str = "",
    ) -> "Study":
        """Return the stored study, or a new one.

        data: digest of the records. Raises UserError if the stored study has another config or
        other records.
        """
        values = config.model_dump(mode="json")
        trials: list[Trial] = []
        if (content := storage.read_file(storage.join_path(url, STUDY))) is not None:
            earlier = cls.load(url)
            before = earlier.config.model_dump(mode="json")
            if differing := config_differences(before, values, MAY_CHANGE):
                raise UserError(
                    f"study '{config.study}' exists with another config: {differing}. Restore "
                    "these options, or give another --tune.study."
                )
            if json.loads(content)["data"] != data:
                raise UserError(
                    f"study '{config.study}' exists, and '{config.data.train}' no longer holds the "
                    "records that it was started with. Give another --tune.study."
                )
            trials = earlier.trials
        study = cls(url, config, known, choice, trials)
        study._check_measured()
        with storage.storage_errors(url):
            metrics = [asdict(metric) for metric in known]
            about = {"metrics": metrics, "choice": asdict(choice), "data": data}
            study.write(STUDY, {"config": values, **about})
        return study

    def measured(self, trial: Trial) -> dict[str, float]:
        """Return the figures of a complete trial, by the name of the objective."""
        net = best_epoch(trial.rows, self.choice)
        return {each.name: each.of(net, trial.served) for each in self.goals.measured}

    def _check_measured(self) -> None:
        """Raise UserError if an objective needs a variant that complete trials did not make."""
        for trial in self.in_state("complete"):
            if missing := [name for name in self.goals.variants if name not in trial.served]:
                raise UserError(
                    f"tune.pick requires '{missing[0]}', which the trials of study '{self.name}' "
                    "did not make; give another --tune.study."
                )

    @property
    def name(self) -> str:
        return _name(self.url)

    def run_url(self, run: str) -> str:
        """Return the path or URL of a run."""
        return storage.join_path(self.url, RUNS, run)

    def in_state(self, *states: State) -> list[Trial]:
        """Return the trials that are in one of the states."""
        return [trial for trial in self.trials if trial.state in states]

    def begin(self, values: dict[str, Any], notes: dict[str, Any]) -> Trial:
        """Add a trial and store it. notes: the sampler's attributes."""
        trial = Trial(number=len(self.trials), values=values, began=time.time(), notes=notes)
        self.trials.append(trial)
        self.keep(trial)
        return trial

    def report(self, trial: Trial, figures: dict[str, float]) -> None:
        """Add an epoch's figures to a trial and store it."""
        trial.reports.append(EpochReport(at=self._reported, time=time.time(), figures=figures))
        self._reported += 1
        self.keep(trial)

    def end(self, trial: Trial, state: State, cause: str | None = None) -> None:
        """Set a trial's final state and store it. cause: the reason for a failure."""
        trial.state, trial.cause, trial.ended_at = state, cause, time.time()
        self.keep(trial)

    def take_over(self, trial: Trial, donor: Trial, epoch: int, values: dict[str, Any]) -> None:
        """Let a trial continue from another trial's checkpoint of an epoch, with other options.

        The donor's reports replace the trial's own, because they describe its new weights.
        """
        takeover = Exploit(
            epoch=epoch,
            donor=donor.number,
            donor_run=donor.run,
            values=trial.values,
            rows=trial.rows,
        )
        trial.takeovers.append(takeover)
        trial.values = values
        trial.reports = [each for each in donor.reports if each.figures["epoch"] <= epoch]
        self.keep(trial)

    def keep(self, trial: Trial) -> None:
        """Write a trial's file."""
        _write(
            storage.join_path(self.url, TRIALS, f"{trial.name}.json"), trial.model_dump(mode="json")
        )

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the study."""
        _write(storage.join_path(self.url, name), value)

    def read(self, name: str) -> Any | None:
        """Return the content of a JSON file of the study, None if it does not exist."""
        content = storage.read_file(storage.join_path(self.url, name))
        return None if content is None else json.loads(content)

    def tidy(self) -> None:
        """Remove files that no winner needs: runs of trials that ended early, and Ray's folders."""
        used = {trial.run for trial in self.trials if trial.state in ("running", "complete")}
        runs = storage.join_path(self.url, RUNS)
        for name in storage.list_names(runs):
            if name not in used and name[0].isdecimal():
                storage.remove(storage.join_path(runs, name))
        for name in storage.list_names(self.url):
            if name.startswith(RAY):
                storage.remove(storage.join_path(self.url, name))

    def replay(self) -> Iterator[tuple[Trial, EpochReport]]:
        """Yield the reports of all trials in the order in which they arrived."""
        reports = [(report.at, trial, report) for trial in self.trials for report in trial.reports]
        for _, trial, report in sorted(reports, key=lambda each: each[0]):
            yield trial, report


@contextmanager
def lock_study(url: str) -> Iterator[None]:
    """Lock a study while the block runs. Raises UserError if another process has locked it.

    A study at a URL is not locked, because URLs offer no locks.
    """
    if storage.is_url(url):
        yield
        return
    with storage.storage_errors(url):
        Path(url).mkdir(parents=True, exist_ok=True)
    with Path(url, ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"study '{_name(url)}' is being searched by another process; wait for it, or give "
                "another --tune.study."
            ) from error
        yield


def study_location(root: str, name: str) -> str:
    """Return the path or URL of a study under the storage path."""
    return storage.join_path(root, "studies", name)


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _write(url: str, value: Any) -> None:
    """Write a JSON file atomically."""
    commit.write_atomic(url, json.dumps(value, indent=1).encode())
