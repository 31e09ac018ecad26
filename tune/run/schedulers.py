"""Which trials end early, and which take over from others: Ray Tune's schedulers.

Ray does not keep a scheduler's state. Here it is made again: a scheduler that compares hears all
reports once more, in the order in which they came; a population's is read off its trials.
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

# What a trial tells of an epoch, by name: more of the value is better.
EPOCH, VALUE = "epoch", "value"
# Keeps the draws of a population's rounds apart from those of its first options.
POPULATION_SEED = 7_919


@dataclass(frozen=True)
class SchedulerContext:
    """What a scheduler knows of a study.

    early: the metric by which trials are compared. last_epoch: at which a trial ends anyway.
    most_epochs: of any trial.
    """

    study: Study
    early: Metric
    last_epoch: Callable[[Trial], int]
    most_epochs: int
    seed: int


def create_scheduler(
    config: TuneConfig, terms: SchedulerContext, relaunch: Callable[[Trial], dict[str, Any]]
) -> Any:
    """Return the scheduler that a study is configured to have, in the state that it had.

    relaunch: a trial's config for Ray, after it took over from another.
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
                # Trials do not make way for others.
                min_time_slice=math.inf,
                **named,
            )
        case _:
            return FIFOScheduler()


@dataclass(frozen=True)
class KnownTrial:
    """A trial, as a scheduler that only compares knows it: across restarts the same."""

    trial_id: str


class ReplayedScheduler(FIFOScheduler):
    """Ends trials as one of Ray's schedulers says, which first hears what was before a restart.

    A trial of the study that was told to end, and did not live to be ended, is ended. So is, by any
    rule and without one, a trial whose metric is no longer a number.
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
                # It did go on, whatever is said of it now.
                getattr(rule, "_stopped_trials", set()).discard(KnownTrial(trial.name))
                continue
            if trial.ended:
                self._end(trial)
            elif decision == TrialScheduler.STOP:
                study.end(trial, "stopped")

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._add(self._of(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # Ray flattens what it hands on.
        figures, known = flatten_report(result), self._of(trial)
        if figures["epoch"] <= known.epoch:  # its process was lost, and it came here again
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
            # The bracket of hyperband is drawn from numpy's own generator.
            with seeded_random(self._terms.seed, trial.number):
                self._rule.on_trial_add(None, KnownTrial(trial.name))

    def _judge(self, trial: Trial, figures: dict[str, float]) -> str:
        if figures["epoch"] >= self._terms.last_epoch(trial):
            return str(TrialScheduler.CONTINUE)  # it ends of itself
        if not math.isfinite(self._result(figures)[VALUE]):
            # Not shown to the rule, whose quantiles and medians it would make infinite.
            return str(TrialScheduler.STOP)
        return str(self._rule.on_trial_result(None, KnownTrial(trial.name), self._result(figures)))

    def _end(self, trial: Trial) -> None:
        result = self._result(trial.rows[-1])
        if math.isfinite(result[VALUE]):
            self._rule.on_trial_complete(None, KnownTrial(trial.name), result)

    def _result(self, figures: dict[str, float]) -> dict[str, float]:
        """An epoch as Ray's rules know it; a value that is not a number is minus infinity."""
        return {EPOCH: int(figures["epoch"]), VALUE: self._terms.early.signed(figures)}


class ReplayedPopulation(PopulationBasedTraining):
    """Population based training whose options stay in the space, and whose takeovers are kept.

    All trials wait for one another at each comparison.
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
            return str(TrialScheduler.CONTINUE)  # it came here before, or ends of itself
        # Before others take it over.
        self._terms.study.report(known, flatten_report(result))
        with seeded_random(self._terms.seed, POPULATION_SEED, epoch, known.number):
            return str(super().on_trial_result(tune_controller, trial, result))

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        chosen = super().choose_trial_to_run(tune_controller)
        states = {trial.status for trial in tune_controller.get_live_trials()}
        if chosen is None and states == {RayTrial.PAUSED}:
            # The one they waited for failed or ended, and Ray would wait for ever: without a
            # comparison, on to the next.
            self._next_perturbation_sync += self._perturbation_interval
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen

    def _of(self, trial: Any) -> Trial:
        return self._terms.study.trials[int(trial.trial_id)]

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], Values]:
        """Let a trial take over from a better one; return what Ray sends to its process."""
        mine, donor = self._of(trial), self._of(trial_to_clone)
        epoch = int(self._trial_state[trial_to_clone].last_train_time)
        rng = np.random.default_rng([self._terms.seed, POPULATION_SEED, epoch, mine.number])
        values = {
            name: self._space[name].perturbed(value, rng) for name, value in donor.values.items()
        }
        self._terms.study.take_over(mine, donor, epoch, values)
        return self._relaunch(mine), {}


def flatten_report(result: dict[str, Any]) -> dict[str, float]:
    """An epoch's figures, of what Ray makes of a trial's report: one level, names joined."""
    prefix = "figures/"
    return {
        key.removeprefix(prefix): value for key, value in result.items() if key.startswith(prefix)
    }


@contextmanager
def seeded_random(*key: int) -> Iterator[None]:
    """Within the block the generators of numpy and Python, which Ray draws from, begin at a key."""
    before = np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])
