"""The search: Ray Tune runs the trials that the sampler proposes, and the study stores them."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Experiment
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import SearchAlgorithm

from cluster.errors import UserError
from train.config import Config, portable_options
from train.distributed import launcher
from tune.config import StudyConfig
from tune.run.sampler import TrialSampler
from tune.run.schedulers import SchedulerContext, create_scheduler
from tune.run.study_store import RAY, Study
from tune.run.trainable import TrialProcess, TrialSpec
from tune.run.trial_record import Trial
from tune.search_space import with_values

# Read by Ray Tune. Its own logs are turned off, because callbacks record all reports; so is its
# handler of SIGINT, which would keep Ctrl-C from ending this process.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    # A trial's process changes to the directory of the study itself.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Resources, in bytes of memory, for the process of a trial whose workers are other processes. The
# process needs no CPU, but Ray does not accept an empty set of resources.
LAUNCHER = {"memory": 2.0**20}
# Restarts of a trial whose process was lost. A trial whose training failed is not restarted.
MAX_LOST = 3


class StudyObserver(Protocol):
    """An observer of a running search."""

    def look(self) -> None:
        """Do something at each step of the search; called often."""
        ...

    def ended(self, trial: Trial) -> None:
        """Do something after a trial has ended."""
        ...


@dataclass(frozen=True)
class SearchContext:
    """A study, with the values that its search needs.

    base: the complete training config. parallel: number of trials at the same time.
    """

    study: Study
    base: Config
    parallel: int

    def of(self, trial: Trial) -> Config:
        """Return a trial's training config."""
        return with_values(self.base, trial.values)

    def epochs(self, trial: Trial) -> int:
        """Return the number of epochs of a complete run of a trial."""
        return self.of(trial).optim.epochs

    @property
    def most_epochs(self) -> int:
        """The largest number of epochs that a trial can have."""
        dimension = self.study.config.tune.space.get("optim.epochs")
        return int(max(dimension.tried)) if dimension else self.base.optim.epochs

    def plan(self, trial: Trial) -> dict[str, Any]:
        """Return the fields of the `TrialSpec` that a trial's process receives."""
        config = self.of(trial)
        if self.study.config.tune.scheduling == "pbt":
            # Keep all checkpoints, because other trials may continue from any epoch.
            rule = {"keep": min(self.most_epochs, 1000), "every_steps": None, "every_minutes": 1440}
            checkpoint = config.checkpoint.model_copy(update=rule)
            config = config.model_copy(update={"checkpoint": checkpoint})
        last = trial.takeovers[-1] if trial.takeovers else None
        return TrialSpec(
            number=trial.number,
            config=portable_options(config),
            run_url=self.study.run_url(trial.run),
            reported=trial.epoch,
            early=asdict(self.study.goals.early),
            variants=self.study.goals.variants,
            source_url=self.study.run_url(last.donor_run) if last else None,
            source_epoch=last.epoch if last else 0,
            folder=os.getcwd(),
        ).to_dict()


def max_concurrent(config: StudyConfig) -> int:
    """Return the number of trials at the same time.

    Raises UserError if the cluster cannot hold as many as configured, or if the number of workers
    is not fixed.
    """
    workers, wanted = config.workers, config.tune.parallel
    if workers.num[0] != workers.num[1]:
        raise UserError(
            f"workers.num is {list(workers.num)}; a trial needs a fixed number of workers. "
            f"Give --workers.num {workers.most}."
        )
    fit = launcher.check_resources(workers).workers // workers.most
    if wanted is not None and wanted > fit:
        raise UserError(
            f"tune.parallel is {wanted}, and a trial needs {workers.most} workers with "
            f"{workers.cpus:g} CPU{' and 1 GPU' if workers.gpu else ''} each; the cluster holds "
            f"{fit} such trials. Give --tune.parallel {fit}, or add nodes."
        )
    if config.tune.scheduling == "pbt":
        if wanted is not None:
            raise UserError(
                "tune.parallel cannot be set for pbt, whose trials take turns on the whole "
                "cluster; leave it out."
            )
        return config.tune.num_trials
    return wanted or fit


def build_scheduler(search: SearchContext) -> TrialScheduler:
    """Return the scheduler; end the trials that it had decided to end before a restart."""
    terms = SchedulerContext(
        search.study,
        search.study.goals.early,
        search.epochs,
        search.most_epochs,
        search.study.config.seed,
    )
    return create_scheduler(search.study.config.tune, terms, search.plan)


def run_search(
    search: SearchContext,
    sampler: TrialSampler,
    judge: TrialScheduler,
    watchers: Sequence[StudyObserver],
) -> None:
    """Search until the configured number of trials or the time limit is reached.

    Trials that an earlier search left unfinished run first. watchers: receive the events.
    """
    study = search.study
    workers = study.config.workers
    alone = workers.most == 1
    # With its workers in its own placement group, a trial starts only if all of them fit.
    per_worker = {"CPU": workers.cpus, "GPU": float(workers.gpu)}
    bundles = [per_worker] if alone else [LAUNCHER, *[per_worker] * workers.most]
    os.environ.update(ENVIRONMENT)
    # By default, Ray requests the process of a trial only after that of the previous one started.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(search.parallel)
    # Ray Tune warns about its missing logs, which are turned off above.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    minutes = study.config.tune.max_minutes
    tune.run(
        TrialProcess,
        name=f"{RAY}{time.time_ns():x}",
        storage_path=study.url,
        resources_per_trial=PlacementGroupFactory(bundles),
        search_alg=StudySearchAlgorithm(search, sampler),
        scheduler=judge,
        callbacks=[StudyRecorder(study, watchers)],
        time_budget_s=minutes * 60 if minutes else None,
        max_failures=MAX_LOST,
        # A process that has started workers ends with them, so it cannot run another trial.
        reuse_actors=alone,
        raise_on_failed_trial=False,
        verbose=0,
    )


class StudySearchAlgorithm(SearchAlgorithm):
    """Passes the unfinished trials to Ray Tune, then those that the sampler proposes."""

    def __init__(self, search: SearchContext, sampler: TrialSampler) -> None:
        self._search, self._sampler = search, sampler
        self._waiting = search.study.in_state("running")
        self._live: set[str] = set()
        self._experiment: Experiment | None = None

    @property
    def total_samples(self) -> int:
        return int(self._search.study.config.tune.num_trials)

    def add_configurations(self, experiments: list[Experiment]) -> None:
        (self._experiment,) = experiments

    def next_trial(self) -> RayTrial | None:
        if self.is_finished() or len(self._live) >= self._search.parallel:
            return None
        trial = self._waiting.pop(0) if self._waiting else self._proposed()
        self._live.add(trial.name)
        experiment = self._experiment
        assert experiment is not None
        return RayTrial(
            experiment.spec["run"],
            config=self._search.plan(trial),
            trial_id=trial.name,
            experiment_tag=trial.name,
            placement_group_factory=experiment.spec["resources_per_trial"],
            checkpoint_config=experiment.checkpoint_config,
            max_failures=MAX_LOST,
            storage=experiment.storage,
        )

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._live.discard(trial_id)

    def is_finished(self) -> bool:
        study = self._search.study
        return self._finished or (
            not self._waiting and len(study.trials) >= self._search.study.config.tune.num_trials
        )

    def _proposed(self) -> Trial:
        study = self._search.study
        values, notes = self._sampler.propose()
        return study.begin(values, notes)


class StudyRecorder(tune.Callback):
    """Writes the events of Ray Tune to the study."""

    def __init__(self, study: Study, watchers: Sequence[StudyObserver]) -> None:
        self._study, self._watchers = study, watchers

    def on_trial_result(
        self, iteration: int, trials: Any, trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        study, known = self._study, self._of(trial)
        if "failed" in result:
            study.end(known, "failed", result["failed"])
        elif "served" in result:
            known.served = result["served"]
            study.end(known, "complete")
        elif result["epoch"] > known.epoch:
            study.report(known, result["figures"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: RayTrial, **info: Any) -> None:
        known = self._of(trial)
        if not known.ended:
            self._study.end(known, "stopped")
        self._tell(known)

    def on_trial_error(self, iteration: int, trials: Any, trial: RayTrial, **info: Any) -> None:
        known = self._of(trial)
        if known.ended:
            return
        # Ray also stores the exception itself, but as a pickle.
        said = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line for line in said.splitlines() if line.strip()] or ["unknown reason"]
        cause = f"its process was lost: {lines[-1].strip()[:300]}"
        self._study.end(known, "failed", cause)
        self._tell(known)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        for watcher in self._watchers:
            watcher.look()

    def _of(self, trial: RayTrial) -> Trial:
        return self._study.trials[int(trial.trial_id)]

    def _tell(self, trial: Trial) -> None:
        for watcher in self._watchers:
            watcher.ended(trial)
