"""Every knob of a study: a training config, and under `tune` what is searched and how."""

from typing import Literal, Self

from pydantic import Field, model_validator

from train.config import Config, Section
from tune.search_space import Space

Scheduling = Literal["asha", "hyperband", "median", "pbt", "none"]


class SchedulerConfig(Section):
    """When a trial that does worse than others ends early."""

    name: Scheduling | None = Field(
        None,
        description="asha: at each rung only the best share goes on; hyperband: the same, some "
        "trials with later rungs; median: a trial worse than the median of the means of others "
        "ends; pbt: the worst continue from the best, with options changed; none. asha by default "
        "where one metric is made best, else none: it would end what is small and less accurate.",
    )
    grace_epochs: int = Field(
        1, ge=1, le=10_000, description="Epochs that every trial has: the first rung."
    )
    reduction: float = Field(
        3, ge=2, le=16, description="One in so many goes on at a rung, and rungs lie so far apart."
    )
    brackets: int = Field(3, ge=2, le=8, description="Of hyperband.")
    interval_epochs: int = Field(
        2, ge=1, le=10_000, description="Of pbt: epochs between two comparisons."
    )
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="Of pbt: share of trials that take over, and are copied."
    )


def _is_of_task(objective: str) -> bool:
    """Whether an objective is a metric, of the net or of a variant; else a size or a latency."""
    return objective.rpartition(".")[2].startswith("valid_")


class TuneConfig(Section):
    """What is searched, for what, and how."""

    study: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$",
        description="Name under which it is kept and continued; the model's by default.",
    )
    space: Space = Field(
        min_length=1,
        description="Options by dotted name: {uniform: [low, high]}, loguniform, integer, "
        "loginteger, or {choice: [...]}.",
    )
    objectives: tuple[str, ...] = Field(
        (),
        max_length=4,
        description="valid_…, or of a variant made at the end of a trial VARIANT.valid_…, "
        "VARIANT.bytes, VARIANT.p50_ms@BATCH; the task's own metric by default. The first "
        "valid_… decides which trials end early.",
    )
    pick: str | None = Field(
        None,
        description="Which trial wins: best OBJECTIVE [with OBJECTIVE <= NUMBER [and …]]; the best "
        "in the first objective by default.",
    )
    sampler: Literal["gp", "tpe", "nsga2", "random"] = Field(
        "gp",
        description="Gaussian process, the best of a few dozen trials; tree-structured Parzen "
        "estimator, for hundreds; genetic, for several objectives; random.",
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    start: bool = Field(
        True, description="Begin with the options as the config has them, where in the space."
    )
    num_trials: int = Field(24, ge=1, le=100_000, description="Trials in all.")
    parallel: int | None = Field(
        None, ge=1, le=4096, description="Trials at a time; as many as the cluster holds if none."
    )
    max_minutes: float | None = Field(
        None, gt=0, le=100_000, description="Stop after so long; the same command goes on."
    )
    refit: bool = Field(
        False, description="Train the winner again, on training and validation records together."
    )

    @property
    def scheduling(self) -> Scheduling:
        """The scheduler: the one that is named, or what suits the objectives."""
        if self.scheduler.name:
            return self.scheduler.name
        is_one_metric = len(self.objectives) < 2 and all(map(_is_of_task, self._wanted))
        return "asha" if is_one_metric else "none"

    @property
    def _wanted(self) -> tuple[str, ...]:
        """Names of what is made best: the objectives, and what the winner is best in."""
        picked = self.pick.split(" with ")[0].removeprefix("best ") if self.pick else ""
        return tuple(name for name in (*self.objectives, picked.strip()) if name)

    @model_validator(mode="after")
    def _trials_end_by_what_is_wanted(self) -> Self:
        names = self.objectives or self._wanted
        if self.scheduling != "none" and names and not any(map(_is_of_task, names)):
            raise ValueError(
                f"scheduler {self.scheduling} ends trials by a metric of the validation split, and "
                f"{names[0]} is none; give none, or an objective valid_…"
            )
        return self

    @model_validator(mode="after")
    def _several_are_told_apart(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("an objective is listed twice")
        return self


class StudyConfig(Config):
    """A study: the training config that trials begin from, and what is searched."""

    tune: TuneConfig

    @model_validator(mode="after")
    def _refits_what_was_found(self) -> Self:
        if self.tune.refit and (self.stop.metric or self.tune.scheduling == "pbt"):
            raise ValueError(
                "tune.refit trains all epochs with the winner's options; it goes with neither "
                "stop.metric nor pbt, so leave it out"
            )
        return self

    @property
    def study(self) -> str:
        return self.tune.study or self.name
