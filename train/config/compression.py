"""Options of compression."""

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
    """Whole channels removed, those first that matter least; then trained on."""

    fraction: float = Field(
        0.25,
        gt=0,
        le=0.9,
        description="Fraction of channels removed in each layer; what stays is rounded down to "
        "blocks of 16.",
    )
    epochs: int = Field(6, ge=1, le=10_000, description="Epochs of training afterwards.")
    rate: float = Field(
        0.5, gt=0, le=10, description="Peak rates afterwards, as a share of those in optim."
    )


class Distill(Section):
    """A smaller net that learns from the outputs of the trained one."""

    net: Annotated[Net | None, BeforeValidator(class_path_alone)] = Field(
        None, description="The student; by default the same net with half the widths."
    )
    epochs: int | None = Field(
        None, ge=1, le=10_000, description="Epochs of the student; optim.epochs by default."
    )
    teacher_fraction: float = Field(
        0.9, ge=0, le=1, description="Fraction of the loss that is the teacher's; when pruned too."
    )
    temperature: float = Field(
        2.0, gt=0, le=100, description="Softens the teacher's probabilities; when pruned too."
    )


class Compress(Section):
    variants: tuple[Variant, ...] = Field(
        ("int8_static", "int8_dynamic", "int8_weights"),
        description="Variants to make besides fp32. pruned… and distilled… train again.",
    )
    metric: str | None = Field(
        None,
        description="What a variant must not lose in, valid_loss say; the task's own by default.",
    )
    max_accuracy_drop: float = Field(
        0.005,
        ge=0,
        le=1,
        description="Largest accepted loss of a variant on held-out records, in that metric; "
        "of errors in standard deviations of the target.",
    )
    max_change: float = Field(
        0.03,
        ge=0,
        le=10,
        description="Largest accepted mean change of the probabilities (half the sum of the "
        "differences), or of values in deviations, by forms of the same net.",
    )
    strict: bool = Field(
        False,
        description="Accept only what is within even at the far end of the confidence interval, "
        "for which a drop of 0.005 takes thousands of validation records.",
    )
    optimize_for: Literal["throughput", "latency", "size"] = Field(
        "throughput", description="What the default variant is best in, of those accepted."
    )
    calibration_records: int = Field(
        512, ge=2, le=100_000, description="Training records to measure activation ranges on."
    )
    calibration: tuple[Literal["minmax", "percentile", "squared_error"], ...] = Field(
        ("minmax", "percentile", "squared_error"),
        min_length=1,
        description="Ways to choose activation ranges; the one that changes outputs least is kept.",
    )
    qat_epochs: int = Field(
        2,
        ge=0,
        le=10_000,
        description="Epochs of quantization-aware training where static int8 is not accepted.",
    )
    measure_seconds: float = Field(
        10,
        gt=0,
        le=3600,
        description="Rounds of measuring latencies begin for so long; there are at least five.",
    )
    prune: Prune = Prune()
    distill: Distill = Distill()
