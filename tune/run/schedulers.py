"""Ray Tune's schedulers, which end trials early or let them continue from other trials.

Ray does not store a scheduler's state, so the state is rebuilt after a restart. A scheduler that
only compares trials receives all reports again in their original order. The state of population
based training is derived from its trials.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from train.tasks import Metric
from tune.config import SchedulerConfig, TuneConfig
from tune.run.study_store import Study
from tune.run.trial_record import Trial
from tune.search_space import Values

# Keys in a trial's report on an epoch; a higher value is better.
EPOCH, VALUE = "epoch", "value"
# Makes the random draws of a population's rounds differ from those of its first options.
POPULATION_SEED = 7_919


@dataclass(frozen=True)
class SchedulerContext:
    """The values of a study that a scheduler needs.

    early: the metric by which trials are compared. last_epoch: returns the epoch at which a trial
    is complete. most_epochs: the largest number of epochs of any trial.
    """

    study: Study
    early: Metric
    last_epoch: Callable[[Trial], int]
    most_epochs: int
    seed: int


def create_scheduler(
    config: TuneConfig, terms: SchedulerContext, relaunch: Callable[[Trial], dict[str, Any]]
) -> Any:
    """Return a study's scheduler, in the state that it had before a restart.

    relaunch: returns a trial's config for Ray after the trial took over from another one.
    """
    if config.scheduling == "pbt":
        return ReplayedPopulation(config, terms, relaunch)
    return ReplayedScheduler(_rule(config.scheduling, config.scheduler, terms.most_epochs), terms)


def _rule(name: str, options: SchedulerConfig, most_epochs: int) -> TrialScheduler:
    named = {"time_attr": EPOCH, "metric": VALUE, "mode": "max"}
    grace = min(options.grace_epochs, most_epochs)
    match name:
        case "asha" | "hyperband":
            return AsyncHyperBandScheduler(
                max_t=most_epochs,
                grace_period=grace,
                reduction_factor=options.reduction,
                brackets=options.brackets if name == "hyperband" else 1,
                stop_last_trials=False,
                **named,
            )
        case "median":
            return MedianStoppingRule(
                grace_period=grace,
                # Never pause a trial to let others run.
                min_time_slice=math.inf,
                **named,
            )
        case _:
            return FIFOScheduler()


@dataclass(frozen=True)
class KnownTrial:
    """A trial as Ray's comparing schedulers identify it; equal after a restart."""

    trial_id: str


class ReplayedScheduler(FIFOScheduler):
    """Ends trials by the rule of one of Ray's schedulers, after a replay of the earlier reports.

    A trial that the rule had decided to end before a restart is ended now. A trial whose metric is
    no longer finite is always ended, even without a rule.
    """

    def __init__(self, rule: TrialScheduler, terms: SchedulerContext) -> None:
        super().__init__()
        self._rule, self._terms = rule, terms
        self._added: set[int] = set()
        study = terms.study
        for trial, report in study.replay():
            self._add(trial)
            decision = self._judge(trial, report.figures)
            if report is not trial.reports[-1]:
                # The trial continued after this report, whatever the rule decides now.
                getattr(rule, "_stopped_trials", set()).discard(KnownTrial(trial.name))
                continue
            if trial.ended:
                self._end(trial)
            elif decision == TrialScheduler.STOP:
                study.end(trial, "stopped")

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._add(self._of(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # Ray flattens the reports that it passes on.
        figures, known = flatten_report(result), self._of(trial)
        if figures["epoch"] <= known.epoch:  # repeated after its process was lost
            return str(TrialScheduler.CONTINUE)
        return self._judge(known, figures)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._of(trial).reports:
            self._end(self._of(trial))

    def _of(self, trial: Any) -> Trial:
        return self._terms.study.trials[int(trial.trial_id)]

    def _add(self, trial: Trial) -> None:
        if trial.number not in self._added:
            self._added.add(trial.number)
            # Hyperband draws the bracket from numpy's global generator.
            with seeded_random(self._terms.seed, trial.number):
                self._rule.on_trial_add(None, KnownTrial(trial.name))

    def _judge(self, trial: Trial, figures: dict[str, float]) -> str:
        if figures["epoch"] >= self._terms.last_epoch(trial):
            return str(TrialScheduler.CONTINUE)  # the trial is complete and ends by itself
        if not math.isfinite(self._result(figures)[VALUE]):
            # Not passed to the rule, whose quantiles and medians would become infinite.
            return str(TrialScheduler.STOP)
        return str(self._rule.on_trial_result(None, KnownTrial(trial.name), self._result(figures)))

    def _end(self, trial: Trial) -> None:
        result = self._result(trial.rows[-1])
        if math.isfinite(result[VALUE]):
            self._rule.on_trial_complete(None, KnownTrial(trial.name), result)

    def _result(self, figures: dict[str, float]) -> dict[str, float]:
        """Return an epoch's report for Ray's rules; a NaN becomes minus infinity."""
        return {EPOCH: int(figures["epoch"]), VALUE: self._terms.early.signed(figures)}


class ReplayedPopulation(PopulationBasedTraining):
    """Population based training that keeps options in the space and stores takeovers in the study.

    All trials wait for each other at each comparison.
    """

    def __init__(
        self,
        config: TuneConfig,
        terms: SchedulerContext,
        relaunch: Callable[[Trial], dict[str, Any]],
    ) -> None:
        options = config.scheduler
        super().__init__(
            time_attr=EPOCH,
            metric=VALUE,
            mode="max",
            perturbation_interval=options.interval_epochs,
            quantile_fraction=options.quantile,
            custom_explore_fn=lambda config: config,  # see _get_new_config
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        self._space, self._terms, self._relaunch = config.space, terms, relaunch
        last_round = max(
            (takeover.epoch for trial in terms.study.trials for takeover in trial.takeovers),
            default=0,
        )
        self._next_perturbation_sync = last_round + options.interval_epochs

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        known = self._of(trial)
        if not known.reports:
            return
        at = known.epoch // self._perturbation_interval * self._perturbation_interval
        state = self._trial_state[trial]
        state.last_perturbation_time = self._next_perturbation_sync - self._perturbation_interval
        for figures in known.rows:
            if figures["epoch"] == at:
                result = {EPOCH: at, VALUE: self._terms.early.signed(figures)}
                self._save_trial_state(state, at, result, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        known = self._of(trial)
        epoch = result[EPOCH]
        if epoch <= known.epoch or epoch >= self._terms.last_epoch(known):
            return str(TrialScheduler.CONTINUE)  # repeated after a loss, or complete
        # Stored first, because other trials may now take over its reports.
        self._terms.study.report(known, flatten_report(result))
        with seeded_random(self._terms.seed, POPULATION_SEED, epoch, known.number):
            return str(super().on_trial_result(tune_controller, trial, result))

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        chosen = super().choose_trial_to_run(tune_controller)
        states = {trial.status for trial in tune_controller.get_live_trials()}
        if chosen is None and states == {RayTrial.PAUSED}:
            # The trial that the others waited for has failed or ended, and Ray would wait forever.
            # Skip this comparison.
            self._next_perturbation_sync += self._perturbation_interval
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen

    def _of(self, trial: Any) -> Trial:
        return self._terms.study.trials[int(trial.trial_id)]

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], Values]:
        """Let a trial take over from a better one; return the config for its process."""
        mine, donor = self._of(trial), self._of(trial_to_clone)
        epoch = int(self._trial_state[trial_to_clone].last_train_time)
        rng = np.random.default_rng([self._terms.seed, POPULATION_SEED, epoch, mine.number])
        values = {
            name: self._space[name].perturbed(value, rng) for name, value in donor.values.items()
        }
        self._terms.study.take_over(mine, donor, epoch, values)
        return self._relaunch(mine), {}


def flatten_report(result: dict[str, Any]) -> dict[str, float]:
    """Return an epoch's figures from the report that Ray has flattened to `figures/NAME` keys."""
    prefix = "figures/"
    return {
        key.removeprefix(prefix): value for key, value in result.items() if key.startswith(prefix)
    }


@contextmanager
def seeded_random(*key: int) -> Iterator[None]:
    """Seed the global generators of numpy and Python, which Ray uses; restore them after the block.

    key: numbers that determine the seed.
    """
    before = np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])
