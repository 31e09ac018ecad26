"""Proposals for the next trial, made by Optuna from the stored trials.

Optuna stores nothing: its study is rebuilt from the stored trials, and each proposal is drawn by a
sampler whose seed depends on the study and on the number of the trial. A proposal is therefore a
function of the trials before it, however often the driver was restarted.
"""

import json
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from train.metrics import best_epoch
from tune.run.study_store import Study
from tune.run.trial_record import Trial
from tune.search_space import Values

# Random trials before a sampler fits its model of the space.
STARTUP_TRIALS = 8
# Trials per generation of the genetic sampler.
POPULATION = 12
# Makes the seeds of trials differ between studies that have different seeds.
SEED_STRIDE = 1_000_003


class TrialSampler:
    """Proposes options for a study's next trial, based on the trials in the study.

    first: options of the first trial; those that are missing are sampled.
    """

    def __init__(self, study: Study, first: Values) -> None:
        self._study, self._first = study, first
        self._config, self._goals = study.config.tune, study.goals
        self._distributions = {
            name: each.distribution() for name, each in self._config.space.items()
        }
        # Whether every epoch reports the objective: there is one, and it is the model's metric.
        objectives = self._goals.objectives
        self._by_epoch = len(objectives) == 1 and objectives[0].metric == self._goals.early
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def propose(self) -> tuple[Values, dict[str, Any]]:
        """Return the options of a new trial, and Optuna's attributes to store with it.

        Optuna's study is rebuilt each time, because a failed trial counts as the worst of all
        trials that have finished so far.
        """
        known, number = self._known_study(), len(self._study.trials)
        known.sampler = self._sampler(number)
        if number == 0 and self._first:
            known.enqueue_trial(
                {name: self._config.space[name].raw(value) for name, value in self._first.items()}
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            asked = known.ask(self._distributions)
        assert asked.number == number
        values = {
            name: dimension.value(asked.params[name])
            for name, dimension in self._config.space.items()
        }
        # The genetic sampler stores generations as attributes of trials, and parents as attributes
        # of the study.
        notes = {
            "trial": _plain(known.get_trials(deepcopy=False)[number].system_attrs),
            "study": _plain(known._storage.get_study_system_attrs(known._study_id)),
        }
        return values, notes

    def _known_study(self) -> optuna.Study:
        """Return an Optuna study with all trials."""
        objectives = self._goals.objectives
        known = optuna.create_study(
            directions=["maximize" if each.maximize else "minimize" for each in objectives]
        )
        worst = self._worst()
        for trial in self._study.trials:
            known.add_trial(self._frozen(trial, worst))
            for key, value in trial.notes.get("study", {}).items():
                known._storage.set_study_system_attr(known._study_id, key, value)
        return known

    def _frozen(self, trial: Trial, worst: list[float] | None) -> FrozenTrial:
        state, values = self._outcome(trial, worst)
        frozen = create_trial(
            state=state,
            values=values,
            params={
                name: self._config.space[name].raw(value) for name, value in trial.values.items()
            },
            distributions=self._distributions,
            intermediate_values={
                int(row["epoch"]): row[self._goals.early.name]
                for row in trial.rows
                if self._by_epoch and np.isfinite(row[self._goals.early.name])
            },
            system_attrs=trial.notes.get("trial", {}),
        )
        frozen.datetime_start = datetime.fromtimestamp(trial.began)
        return frozen

    def _outcome(
        self, trial: Trial, worst: list[float] | None
    ) -> tuple[TrialState, list[float] | None]:
        """Return a trial's state and values for Optuna.

        worst: the worst figures of all finished trials, by objective; None if there are none.
        """
        if trial.state == "running":
            return TrialState.RUNNING, None
        if (values := self._measured(trial)) is not None:
            return TrialState.COMPLETE, values
        is_single = len(self._goals.objectives) == 1
        if is_single and self._config.sampler == "tpe":
            return TrialState.PRUNED, None  # TPE ranks it by its epochs, after complete trials
        # The other samplers use complete trials only.
        if (reached := self._reached(trial)) is not None:
            return TrialState.COMPLETE, [reached]
        # A trial that was ended early did not fail, and its other figures are unknown.
        is_early = trial.state == "stopped" and np.isfinite(trial.rows[-1][self._goals.early.name])
        if worst is None or (is_early and not is_single):
            return TrialState.FAIL, None
        return TrialState.COMPLETE, worst

    def _measured(self, trial: Trial) -> list[float] | None:
        """Return a trial's figures by objective; None if not complete, or not all are finite."""
        if trial.state != "complete":
            return None
        measured = self._study.measured(trial)
        values = [measured[each.name] for each in self._goals.objectives]
        return values if np.isfinite(values).all() else None

    def _worst(self) -> list[float] | None:
        """Return the worst figure of all finished trials in each objective, None without any."""
        found = [values for trial in self._study.trials if (values := self._measured(trial))]
        if len(self._goals.objectives) == 1:
            reached = (self._reached(trial) for trial in self._study.trials if trial.ended)
            found += [[value] for value in reached if value is not None]
        if not found:
            return None
        by_objective = zip(self._goals.objectives, zip(*found, strict=True), strict=True)
        return [(min if each.maximize else max)(values) for each, values in by_objective]

    def _reached(self, trial: Trial) -> float | None:
        """Return the only objective at a trial's best epoch; None if it failed or has none."""
        if trial.state == "failed" or not trial.reports or not self._by_epoch:
            return None
        value = best_epoch(trial.rows, self._study.choice)[self._goals.early.name]
        return float(value) if np.isfinite(value) else None

    def _sampler(self, number: int) -> BaseSampler:
        seed = (self._study.config.seed * SEED_STRIDE + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            match self._config.sampler:
                case "tpe":
                    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True)
                case "gp":
                    return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
                case "nsga2":
                    return NSGAIISampler(seed=seed, population_size=POPULATION)
                case _:
                    return RandomSampler(seed=seed)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return Optuna's attributes that are plain JSON, except the options of an enqueued trial."""
    found = {}
    for key, value in attributes.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    found.pop("fixed_params", None)
    return found
