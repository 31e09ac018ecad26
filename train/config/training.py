"""Options of a training run: optimizer, augmentation, workers and checkpoints."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from train.config.section import Count, Section


def _span(value: Any) -> Any:
    """Take one count as least and most alike."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return sorted(value) if all(type(item) is int for item in value) else value
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return [value, value]


class Optim(Section):
    name: Literal["muon", "sgd", "adamw"] = Field(
        "muon",
        description="muon makes the steps of hidden linear and convolution layers orthogonal; all "
        "else goes by AdamW. Tables and texts get adamw by default.",
    )
    lr: float = Field(0.1, gt=0, le=10, description="Peak learning rate, after warm-up.")
    vector_lr: float = Field(
        0.02, gt=0, le=10, description="Peak rate of biases and norms, with muon."
    )
    head_lr: float = Field(
        0.01, gt=0, le=10, description="Peak rate of weights that muon does not turn."
    )
    momentum: float = Field(0.6, ge=0, lt=1, description="Nesterov momentum of muon and sgd.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="For weights, not biases or norms; with muon not for those that it turns.",
    )
    epochs: int = Field(8, ge=1, le=10_000, description="Passes over the training records.")
    batch_size: int = Field(
        500, ge=1, le=65_536, description="Samples per step in all, whatever the workers."
    )
    schedule: Literal["linear", "cosine", "one_cycle", "constant"] = Field(
        "linear", description="How the rate falls after warm-up."
    )
    warmup_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of all steps in which the rate rises; 0.3 with one_cycle and 0 "
        "otherwise by default.",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Largest norm of the whole gradient; larger ones are scaled down."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep and use an exponential moving average of the weights, by step.",
    )
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="Share of the target spread evenly over all classes."
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes count as much in all as frequent ones."
    )


class Stage(Section):
    until: float = Field(1.0, gt=0, le=1, description="Share of all steps at which it ends.")
    scale: float = Field(
        1.0, ge=0.05, le=1, description="Shrink images to this share of their height and width."
    )
    crop: float = Field(
        1.0, ge=0.05, le=1, description="Cut out this share of the height and width, anywhere."
    )

    @property
    def side(self) -> float:
        """Share of height and width that the net sees."""
        return self.scale * self.crop


def _last_to_the_end(stages: Sequence[Stage]) -> Sequence[Stage]:
    ends = [stage.until for stage in stages]
    if ends != sorted(set(ends)) or ends[-1] != 1:
        raise ValueError("stages end one after the other, the last at 1")
    return stages


class Augment(Section):
    stages: Annotated[tuple[Stage, ...], AfterValidator(_last_to_the_end)] = Field(
        (Stage(),),
        min_length=1,
        description="Smaller images for a part of the run, which takes less time; whole ones are "
        "evaluated.",
    )
    flip: bool = Field(False, description="Mirror left and right, alternating by epoch.")
    translate: int = Field(0, ge=0, le=64, description="Shift by up to this many pixels.")
    crop_area: float | None = Field(
        None, gt=0, le=1, description="Zoom into a random crop of at least this share of the area."
    )
    cutout: int = Field(0, ge=0, le=256, description="Grey out a square of this many pixels.")
    mixup: float = Field(
        0, ge=0, le=10, description="Blend pairs of images; the alpha of the share's Beta."
    )
    cutmix: float = Field(
        0, ge=0, le=10, description="Paste boxes between pairs; the alpha of the share's Beta."
    )


class Stop(Section):
    metric: str | None = Field(
        None, description="End the run early when this metric of an epoch no longer gets better."
    )
    patience: int = Field(3, ge=1, le=10_000, description="Epochs without a better value.")
    folds: int = Field(
        0,
        ge=0,
        le=100,
        description="Where training records are few: choose the number of epochs by "
        "cross-validation over so many parts of them, and train on all of them for that many.",
    )
    after: int | None = Field(
        None,
        ge=1,
        description="End the run after this epoch, whose weights are kept; cross-validation sets "
        "it. The schedule goes by optim.epochs.",
    )

    @model_validator(mode="after")
    def _folds_are_compared(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds is 1; expected 0, or at least 2 parts to train on the others")
        if self.folds and self.metric is None:
            raise ValueError("folds are compared by stop.metric, which is not given; give both")
        return self


class Workers(Section):
    num: Annotated[tuple[Count, Count], BeforeValidator(_span)] = Field(
        (2, 2),
        description="Training workers, one process each; [least, most] grows and shrinks with "
        "the cluster.",
    )
    gpu: bool = Field(False, description="One GPU for each worker.")
    cpus: float = Field(1, gt=0, le=1024, description="Cores for each worker.")
    micro_batches: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Parts that every global batch is divided into, at least one for each worker; "
        "a worker accumulates the gradients of its parts. Fixed for the run; by default one for "
        "each of the most workers.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="A whole copy of the net in each worker, or (fsdp) a shard of it."
    )
    max_failures: int = Field(
        3, ge=0, le=1000, description="Failures of workers after which the run gives up."
    )

    @property
    def most(self) -> int:
        return self.num[1]

    @property
    def all_cpus(self) -> int:
        """Cores for the most workers."""
        return math.ceil(self.most * self.cpus)


class DecisionRule(Section):
    """Which class or labels a record is said to have; the most probable ones by default."""

    cost: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description="The cost of each answer, [[0, 1], [5, 0]]: rows are the true classes, columns "
        "the answers, both in the order of the classes; of several labels no and yes to one.",
    )
    recall: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the records of the rarer of two classes, or of each label, to be "
        "recognised.",
    )

    @model_validator(mode="after")
    def _is_one_rule(self) -> Self:
        if self.cost is not None and self.recall is not None:
            raise ValueError("decision_rule has both cost and recall; give one")
        return self


class Checkpoint(Section):
    every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints within an epoch; by time alone if none."
    )
    every_minutes: float = Field(
        5, gt=0, le=1440, description="Minutes between checkpoints within an epoch."
    )
    keep: int = Field(2, ge=1, le=1000, description="Latest checkpoints to keep, besides the best.")
    metric: str | None = Field(
        None,
        description="Metric whose best epoch becomes the model, or last; by default that of stop, "
        "else the task's own.",
    )
