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
    """Proposes options for a study's next trial, by the trials that the study keeps.

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

    def propose(self) -> tuple[Values, dict[str, Any]]:
        """Return the options of a new trial, and what is to be noted of it.

        Optuna's study is rebuilt each time, as a failed trial counts as the worst of all that have
        finished by then.
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
        # The genetic sampler notes generations at trials, and parents at the study.
        notes = {
            "trial": _plain(known.get_trials(deepcopy=False)[number].system_attrs),
            "study": _plain(known._storage.get_study_system_attrs(known._study_id)),
        }
        return values, notes

    def _known_study(self) -> optuna.Study:
        """The trials as Optuna has them."""
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
        """How a trial counts. worst: of all that finished, by objective."""
        if trial.state == "running":
            return TrialState.RUNNING, None
        if (values := self._measured(trial)) is not None:
            return TrialState.COMPLETE, values
        is_single = len(self._goals.objectives) == 1
        if is_single and self._config.sampler == "tpe":
            return TrialState.PRUNED, None  # ranked by its epochs, after those that are complete
        # The others know complete trials only.
        if (reached := self._reached(trial)) is not None:
            return TrialState.COMPLETE, [reached]
        # A trial that was ended early is no failure, and its latency is not known.
        is_early = trial.state == "stopped" and np.isfinite(trial.rows[-1][self._goals.early.name])
        if worst is None or (is_early and not is_single):
            return TrialState.FAIL, None
        return TrialState.COMPLETE, worst

    def _measured(self, trial: Trial) -> list[float] | None:
        """The figures of a complete trial by objective; None of another, or if one is no number."""
        if trial.state != "complete":
            return None
        measured = self._study.measured(trial)
        values = [measured[each.name] for each in self._goals.objectives]
        return values if np.isfinite(values).all() else None

    def _worst(self) -> list[float] | None:
        """The worst figure in each objective of all trials that have finished."""
        found = [values for trial in self._study.trials if (values := self._measured(trial))]
        if len(self._goals.objectives) == 1:
            reached = (self._reached(trial) for trial in self._study.trials if trial.ended)
            found += [[value] for value in reached if value is not None]
        if not found:
            return None
        by_objective = zip(self._goals.objectives, zip(*found, strict=True), strict=True)
        return [(min if each.maximize else max)(values) for each, values in by_objective]

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
