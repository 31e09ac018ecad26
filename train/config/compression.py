"""Options of compression: which variants to make, and when to accept them."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
)

from train.config.net import Net, class_path_alone
from train.config.section import Section

Variant = Literal[
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "fp8",
    "int8_static",
    "int8_dynamic",
    "int8_weights",
    "pruned",
    "pruned_int8",
    "distilled",
    "distilled_int8",
]


class Prune(Section):
    """Options of pruning: the least important channels are removed, then the rest is trained."""

    fraction: float = Field(
        0.25,
        gt=0,
        le=0.9,
        description="Fraction of channels to remove in each layer; the number that remains is "
        "rounded down to a multiple of 16. Raise it for smaller and faster variants.",
    )
    epochs: int = Field(6, ge=1, le=10_000, description="Epochs of training after pruning.")
    rate: float = Field(
        0.5,
        gt=0,
        le=10,
        description="Peak learning rates after pruning, as a fraction of those in optim.",
    )


class Distill(Section):
    """Options of distillation: a smaller student learns from the outputs of the trained model."""

    net: Annotated[Net | None, BeforeValidator(class_path_alone)] = Field(
        None,
        description="Architecture of the student. By default it is the trained network with half "
        "the widths; a custom network has no such default.",
    )
    epochs: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Epochs of training the student; by default as many as optim.epochs. The "
        "student of a pretrained encoder has the options of optim of a net from scratch.",
    )
    teacher_fraction: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Weight of the loss against the teacher's outputs, 0 to 1; the loss against "
        "the targets has the rest. Training after pruning and quantization-aware training use it "
        "too.",
    )
    temperature: float = Field(
        2.0,
        gt=0,
        le=100,
        description="Temperature that softens the probabilities of teacher and student; 1 leaves "
        "them unchanged. Training after pruning and quantization-aware training use it too.",
    )


class Compress(Section):
    """Options of compression: which variants to make, and when the gate accepts them."""

    variants: tuple[Variant, ...] = Field(
        ("int8_static", "int8_dynamic", "int8_weights"),
        description="Variants to make in addition to fp32. pruned, distilled and their _int8 forms "
        "train again; fp16, int8 and fp8 need a GPU.",
    )
    metric: str | None = Field(
        None,
        description="Validation metric by which the gate compares a variant with fp32, such as "
        "valid_loss; by default the task's main metric.",
    )
    max_accuracy_drop: float = Field(
        0.005,
        ge=0,
        le=1,
        description="Largest accepted drop in compress.metric against fp32, such as 0.005 for half "
        "a percentage point of accuracy; for rmse, mae and quantile_loss in standard deviations of "
        "the target. Raise it if a smaller model is worth the drop.",
    )
    max_change: float = Field(
        0.03,
        ge=0,
        le=10,
        description="Largest accepted mean change of the predictions against fp32, for variants "
        "that are neither pruned nor distilled: half the sum of the absolute differences of "
        "probabilities, or the difference of values in standard deviations of the target.",
    )
    strict: bool = Field(
        False,
        description="Accept a variant only if the upper end of the 95 % confidence interval of its "
        "drop is within max_accuracy_drop. With a limit of 0.005 this takes thousands of "
        "validation records.",
    )
    optimize_for: Literal["throughput", "latency", "size"] = Field(
        "throughput",
        description="How to choose the default variant among the accepted ones: most records per "
        "second, lowest latency of a single record, or fewest bytes.",
    )
    calibration_records: int = Field(
        512,
        ge=2,
        le=100_000,
        description="Number of training records on which the activation ranges of static int8 are "
        "measured; at least one per class.",
    )
    calibration: tuple[Literal["minmax", "percentile", "squared_error"], ...] = Field(
        ("minmax", "percentile", "squared_error"),
        min_length=1,
        description="Methods to try for the activation ranges of static int8; the one that changes "
        "the outputs least is used.",
    )
    qat_epochs: int = Field(
        2,
        ge=0,
        le=10_000,
        description="Epochs of quantization-aware training, done only if the gate does not accept "
        "static int8 without it; 0 turns it off.",
    )
    measure_seconds: float = Field(
        10,
        gt=0,
        le=3600,
        description="Seconds spent on measuring latencies: no round starts later, but at least "
        "five rounds are run, two of batches that take over 0.2 s. Raise it on a busy machine.",
    )
    prune: Prune = Field(Prune(), description="Used by the variants pruned and pruned_int8.")
    distill: Distill = Field(
        Distill(), description="Used by the variants distilled and distilled_int8."
    )
