"""Configuration of a study: a training config, and the search under `tune`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from train.config import Config, Section
from tune.search_space import Space

Scheduling = Literal["asha", "hyperband", "median", "pbt", "none"]


class SchedulerConfig(Section):
    """The scheduler, which ends trials early that do worse than others."""

    name: Scheduling | None = Field(
        None,
        description="Rule that ends trials early. asha: only the best trials pass each rung; "
        "hyperband: like asha, with later rungs for some trials; median: trials worse than the "
        "median of the others' means end; pbt: the worst trials continue from the best ones, with "
        "changed options; none. Default: asha if only one metric is optimised, otherwise none, "
        "because early stopping would end small but less accurate models.",
    )
    grace_epochs: int = Field(
        1, ge=1, le=10_000, description="Epochs before a trial can be ended: the first rung."
    )
    reduction: float = Field(
        3,
        ge=2,
        le=16,
        description="Factor between the epochs of two rungs; one in this many trials passes a "
        "rung. Larger values end more trials.",
    )
    brackets: int = Field(
        3, ge=2, le=8, description="Number of groups of trials with different rungs, for hyperband."
    )
    interval_epochs: int = Field(
        2, ge=1, le=10_000, description="Epochs between two comparisons of all trials, for pbt."
    )
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="Share of the worst trials that continue from as many of the best, for pbt.",
    )


def _is_of_task(objective: str) -> bool:
    """Return whether an objective is a validation metric rather than a size or a latency."""
    return objective.rpartition(".")[2].startswith("valid_")


class TuneConfig(Section):
    """The search: its space, its objectives and its method."""

    study: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$",
        description="Name under which the study is stored and continued. Default: the model's.",
    )
    space: Space = Field(
        min_length=1,
        description="Training options to search, by dotted name. Each is {uniform: [low, high]}, "
        "loguniform, integer, loginteger, or {choice: [...]}.",
    )
    objectives: tuple[str, ...] = Field(
        (),
        max_length=4,
        description="Figures to optimise: valid_METRIC of the model, or VARIANT.valid_METRIC, "
        "VARIANT.bytes or VARIANT.p50_ms@BATCH of a variant made at the end of a trial. Default: "
        "the task's main metric. The first valid_METRIC decides which trials end early.",
    )
    pick: str | None = Field(
        None,
        description="Rule for the winner: best OBJECTIVE [with OBJECTIVE <= NUMBER [and …]]. "
        "Default: the best in the first objective.",
    )
    sampler: Literal["gp", "tpe", "nsga2", "random"] = Field(
        "gp",
        description="Method that proposes trials. gp: Gaussian process, best for a few dozen "
        "trials; tpe: tree-structured Parzen estimator, for hundreds; nsga2: genetic, for several "
        "objectives; random.",
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    start: bool = Field(
        True, description="Use the config's own options in the first trial, if they are in space."
    )
    num_trials: int = Field(24, ge=1, le=100_000, description="Total number of trials.")
    parallel: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Number of trials at the same time. Default: as many as the cluster holds.",
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        le=100_000,
        description="Minutes after which the search stops; the same command continues it. "
        "Default: no limit.",
    )
    refit: bool = Field(
        False, description="Train the winner again on training and validation records together."
    )

    @property
    def scheduling(self) -> Scheduling:
        """The configured scheduler, or by default the one that suits the objectives."""
        if self.scheduler.name:
            return self.scheduler.name
        is_one_metric = len(self.objectives) < 2 and all(map(_is_of_task, self._wanted))
        return "asha" if is_one_metric else "none"

    @property
    def _wanted(self) -> tuple[str, ...]:
        """Names of the figures to optimise: the objectives, and the one that decides the winner."""
        picked = self.pick.split(" with ")[0].removeprefix("best ") if self.pick else ""
        return tuple(name for name in (*self.objectives, picked.strip()) if name)

    @model_validator(mode="after")
    def _trials_end_by_what_is_wanted(self) -> Self:
        names = self.objectives or self._wanted
        if self.scheduling != "none" and names and not any(map(_is_of_task, names)):
            raise ValueError(
                f"scheduler {self.scheduling} compares trials by a validation metric, but "
                f"{names[0]} is not one; give scheduler none, or add an objective valid_METRIC"
            )
        return self

    @model_validator(mode="after")
    def _several_are_told_apart(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("an objective is listed twice")
        return self


class StudyConfig(Config):
    """A study: the training config from which trials start, and the search."""

    tune: TuneConfig

    @model_validator(mode="after")
    def _refits_what_was_found(self) -> Self:
        if self.tune.refit and self.tune.scheduling == "pbt":
            raise ValueError(
                "tune.refit trains with one set of options, and pbt changes them during training; "
                "leave one of them out"
            )
        return self

    @property
    def study(self) -> str:
        """The name under which the study is stored."""
        return self.tune.study or self.name
