"""Options of a training run: optimizer, early stopping, workers, decisions and checkpoints."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from train.config.section import Count, Section


def _span(value: Any) -> Any:
    """Return a single count as the pair [count, count], and a pair of counts in order."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return sorted(value) if all(type(item) is int for item in value) else value
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return [value, value]


class Optim(Section):
    """Options of the optimizer and the learning rate."""

    name: Literal["muon", "sgd", "adamw"] = Field(
        "muon",
        description="Optimizer. muon makes the updates of hidden linear and convolution layers "
        "orthogonal and trains all other parameters with AdamW. Tables and texts default to "
        "adamw.",
    )
    lr: float = Field(
        0.1,
        gt=0,
        le=10,
        description="Peak learning rate, after warm-up; with muon of the weights that muon "
        "updates. Tables default to 0.002, texts to 0.005. Lower it if the loss diverges.",
    )
    vector_lr: float = Field(
        0.02,
        gt=0,
        le=10,
        description="Peak learning rate of biases and normalisation parameters; used with muon "
        "only.",
    )
    head_lr: float = Field(
        0.01,
        gt=0,
        le=10,
        description="Peak learning rate of the last layer and of other weights that muon does not "
        "update, such as embeddings; used with muon only.",
    )
    backbone_lr: float = Field(
        3e-5,
        gt=0,
        le=10,
        description="Peak learning rate of the last layer of a pretrained encoder, which AdamW "
        "trains.",
    )
    layer_decay: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Factor by which each layer of a pretrained encoder learns slower than the "
        "layer after it.",
    )
    momentum: float = Field(
        0.6, ge=0, lt=1, description="Nesterov momentum of muon and sgd; adamw ignores it."
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight decay. It does not apply to biases, normalisation parameters and the "
        "weights that muon updates. Tables default to 0.1.",
    )
    epochs: int = Field(
        8,
        ge=1,
        le=10_000,
        description="Passes over the training records. Tables default to 50 to 200 and texts to 6 "
        "or 40, by the number of records; stop.metric usually ends them earlier.",
    )
    batch_size: int = Field(
        500,
        ge=1,
        le=65_536,
        description="Samples per optimizer step, over all workers together. Tables default to 64, "
        "256 or 1024, by the number of records, and texts to 64.",
    )
    batch_by: Literal["samples", "tokens"] = Field(
        "samples",
        description="What the batches of an epoch share equally if records differ in length, as "
        "texts do: samples, or tokens; with tokens, batches of long records have fewer samples, "
        "and batch_size is their average.",
    )
    schedule: Literal["linear", "cosine", "one_cycle", "constant"] = Field(
        "linear",
        description="Course of the learning rate after warm-up: linear and cosine fall to 0, "
        "one_cycle rises and falls like a cosine, constant stays at the peak. Tables default to "
        "constant.",
    )
    warmup_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Fraction of all steps during which the learning rate rises to its peak; by "
        "default 0.3 with one_cycle, otherwise 0.",
    )
    clip_norm: float | None = Field(
        None,
        gt=0,
        description="Largest norm of the gradient over all parameters; a larger gradient is scaled "
        "down to it. By default gradients are not clipped. Set it if single steps spoil the loss.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step of an exponential moving average of the weights, such as 0.98; "
        "the averaged weights are evaluated and become the model. By default the weights are not "
        "averaged.",
    )
    label_smoothing: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of each target's probability that is spread evenly over all classes; "
        "0 turns smoothing off. Tables and texts default to 0. Numbers to predict ignore it.",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="none gives every record the same weight in the loss; balanced gives every "
        "class the same total weight. Use balanced if rare classes are missed.",
    )


class Stop(Section):
    """Options that end a run before all of optim.epochs are trained."""

    metric: str | None = Field(
        None,
        description="Validation metric, such as valid_loss: training ends when it has not improved "
        "for stop.patience epochs. By default all epochs are trained; tables and texts default to "
        "valid_loss.",
    )
    patience: int = Field(
        3,
        ge=1,
        le=10_000,
        description="Epochs without improvement of stop.metric after which training ends. Tables "
        "default to 4 or 16 and texts to 3 or 16, by the number of records.",
    )
    folds: int = Field(
        0,
        ge=0,
        le=100,
        description="Number of cross-validation folds that choose the number of epochs by "
        "stop.metric; the model is then trained on all training records for that many. 0 turns "
        "it off. Tables and texts of fewer than 2,000 records default to 5.",
    )
    after: int | None = Field(
        None,
        ge=1,
        description="End the run after this many epochs; the learning rate still follows the "
        "schedule of optim.epochs. Cross-validation (stop.folds) and tune.refit set this option.",
    )

    @model_validator(mode="after")
    def _folds_are_compared(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds is 1; expected 0 for no cross-validation, or at least 2")
        if self.folds and self.metric is None:
            raise ValueError("folds needs stop.metric to compare epochs; give both")
        return self


class Workers(Section):
    """Options of the processes that train."""

    num: Annotated[tuple[Count, Count], BeforeValidator(_span)] = Field(
        (2, 2),
        description="Number of training workers, one process each. With a pair [least, most] the "
        "run grows and shrinks with the cluster.",
    )
    gpu: bool = Field(False, description="Reserve one GPU for each worker, and train on it.")
    cpus: float = Field(
        1, gt=0, le=1024, description="CPU cores to reserve for each worker; fractions are allowed."
    )
    micro_batches: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Number of micro-batches that each batch is divided into, fixed for the run; a "
        "worker with several accumulates their gradients. By default the largest number of "
        "workers, which is also the minimum. Raise it if a batch does not fit into memory, or to "
        "resume later with more workers.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp keeps a full copy of the model in each worker; fsdp divides it among the "
        "workers, for models that are too large for one.",
    )
    max_failures: int = Field(
        3,
        ge=0,
        le=1000,
        description="How often workers that fail are restarted from the last checkpoint; after "
        "one more failure the run ends.",
    )

    @property
    def most(self) -> int:
        """Largest number of workers."""
        return self.num[1]

    @property
    def all_cpus(self) -> int:
        """CPU cores that the largest number of workers needs, rounded up."""
        return math.ceil(self.most * self.cpus)


class DecisionRule(Section):
    """How the predicted class or labels follow from the probabilities.

    By default the most probable class, or every label with a probability of at least 0.5.
    """

    cost: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description="Cost of each decision, such as [[0, 1], [5, 0]]: one row per true class, one "
        "column per predicted class, both in the order of the classes; for multilabel targets no "
        "and yes. The decision with the least expected cost is made. By default every mistake "
        "costs the same.",
    )
    recall: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Fraction of the records of the rarer class, or of each label, that must be "
        "recognised, such as 0.9; for two classes or labels. The threshold is set on the "
        "validation records. Use it if missing a record is worse than a false alarm.",
    )

    @model_validator(mode="after")
    def _is_one_rule(self) -> Self:
        if self.cost is not None and self.recall is not None:
            raise ValueError("decision_rule has both cost and recall; give one")
        return self


class Checkpoint(Section):
    """Options of checkpoints, which are also written at the end of each epoch."""

    every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints within an epoch, in addition to those that "
        "checkpoint.every_minutes causes. By default only time counts.",
    )
    every_minutes: float = Field(
        5,
        gt=0,
        le=1440,
        description="Minutes between checkpoints within an epoch. Lower it if workers are often "
        "interrupted.",
    )
    keep: int = Field(
        2,
        ge=1,
        le=1000,
        description="Number of latest checkpoints to keep, in addition to the best one.",
    )
    metric: str | None = Field(
        None,
        description="Validation metric whose best epoch becomes the model, such as valid_loss, or "
        "last for the last epoch. By default stop.metric, or else the task's main metric.",
    )
