"""Which options to try next: Optuna, told of what has been tried.

Optuna keeps nothing: its study is made of the trials that are kept, and each proposal is drawn by
a sampler whose seed is that of the study and the trial. So what is proposed is a function of the
trials before it, whether the driver was started once or often.
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

# Trials before a model of the space is made.
STARTUP_TRIALS = 8
# Of a generation of the genetic sampler.
POPULATION = 12
# Keeps the seeds of one study's trials apart from those of another's.
SEED_STRIDE = 1_000_003


class TrialSampler:
    """Proposes options for a study's next trial; learns of the trials that are kept.

    first: options of the first trial.
    """

    def __init__(self, study: Study, first: Values) -> None:
        self._study, self._first = study, first
        self._config, self._goals = study.config.tune, study.goals
        self._distributions = {
            name: each.distribution() for name, each in self._config.space.items()
        }
        # Whether figures of epochs are of the metric that is made best.
        objectives = self._goals.objectives
        self._by_epoch = len(objectives) == 1 and objectives[0].metric == self._goals.early
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna = optuna.create_study(
            directions=[
                "maximize" if each.maximize else "minimize" for each in self._goals.objectives
            ]
        )
        self._storage = self.optuna._storage
        for trial in study.trials:
            self.optuna.add_trial(self._frozen(trial))
            for key, value in trial.notes.get("study", {}).items():
                self._storage.set_study_system_attr(self.optuna._study_id, key, value)

    def propose(self, number: int) -> tuple[Values, dict[str, Any]]:
        """Return the options of a new trial, and what is to be noted of it."""
        self.optuna.sampler = self._sampler(number)
        if number == 0 and self._first:
            self.optuna.enqueue_trial(
                {name: self._config.space[name].raw(value) for name, value in self._first.items()}
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            asked = self.optuna.ask(self._distributions)
        assert asked.number == number
        values = {
            name: dimension.value(asked.params[name])
            for name, dimension in self._config.space.items()
        }
        # The genetic sampler notes generations at trials, and parents at the study.
        notes = {
            "trial": _plain(self._known(number).system_attrs),
            "study": _plain(self._storage.get_study_system_attrs(self.optuna._study_id)),
        }
        return values, notes

    def learn(self, trial: Trial) -> None:
        """Learn of a trial that has ended."""
        frozen, identity = self._frozen(trial), self._known(trial.number)._trial_id
        for step, value in frozen.intermediate_values.items():
            # Optuna's storage takes them of a running trial only.
            self._storage.set_trial_intermediate_value(identity, step, value)
        self.optuna.tell(
            trial.number,
            values=frozen.values if frozen.state == TrialState.COMPLETE else None,
            state=frozen.state,
        )

    def _known(self, number: int) -> FrozenTrial:
        return self.optuna.get_trials(deepcopy=False)[number]

    def _frozen(self, trial: Trial) -> FrozenTrial:
        state, values = self._outcome(trial)
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

    def _outcome(self, trial: Trial) -> tuple[TrialState, list[float] | None]:
        if trial.state == "running":
            return TrialState.RUNNING, None
        if trial.state == "complete":
            measured = self._study.measured(trial)
            values = [measured[each.name] for each in self._goals.objectives]
            if np.isfinite(values).all():
                return TrialState.COMPLETE, values
        if len(self._goals.objectives) > 1:
            return TrialState.FAIL, None  # nothing to learn from
        if self._config.sampler == "tpe":
            return TrialState.PRUNED, None  # ranked by its epochs, after those that are complete
        # The others know complete trials only: it counts by what it had reached, or as the worst.
        reached = self._reached(trial)
        if reached is None:
            before = map(self._reached, self._study.trials[: trial.number])
            known = [value for value in before if value is not None]
            if not known:
                return TrialState.FAIL, None
            reached = (min if self._goals.objectives[0].maximize else max)(known)
        return TrialState.COMPLETE, [reached]

    def _reached(self, trial: Trial) -> float | None:
        """What a trial's best epoch reached, where that is a measure of the only objective."""
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
    """What of Optuna's notes is plain JSON; options that it was given to try first are no note."""
    found = {}
    for key, value in attributes.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    found.pop("fixed_params", None)
    return found
