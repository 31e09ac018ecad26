"""manifest.json: what a bundle holds, what it was made of, and how each variant measured."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cluster.storage import FILE_NAME, MODEL_NAME
from train.tasks import TensorSpec

FORMAT_VERSION = 3
FILENAME = "manifest.json"
# Sizes of batches whose latency a profile tells.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorMetadata(StrictModel):
    """A tensor on the wire; -1 is the free batch dimension."""

    name: str
    datatype: str
    shape: list[int]

    @classmethod
    def of(cls, spec: TensorSpec) -> "TensorMetadata":
        return cls(name=spec.name, datatype=spec.datatype, shape=[-1, *spec.shape])


class BundleFile(StrictModel):
    sha256: str
    size_bytes: int


class Timing(StrictModel):
    """How long one engine took for batches of one size: the median and the quartiles."""

    engine: str
    threads: int
    batch_size: int
    p50_ms: float
    low_ms: float
    high_ms: float


class Variant(StrictModel):
    """One form of the net: what runs it, what it measured, and what the gate said."""

    engine: str = Field(description="Name of the engine that runs it.")
    file: str = Field(description="The engine's file, relative to the bundle.")
    recipe: dict[str, Any] = Field(description="How it was made.")
    verdict: Literal["accepted", "refused", "undecided"]
    reason: str = Field(description="Why the gate accepted or refused it, with the figures.")
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics of this variant.")
    drop: list[float] = Field(
        description="How much worse than fp32, and the ends of the 95 % confidence interval; on "
        "the validation split, and where `reason` says so on training records too."
    )
    agreement: float = Field(description="Share of these records answered as by fp32.")
    change: float = Field(
        description="Mean change of these answers from fp32: half the sum over probabilities, "
        "or of values in standard deviations of the target."
    )
    batch_difference: float | None = Field(
        description="How far answers differ between batches of 1, 7 and 64; null where labels do."
    )
    size_bytes: int
    profile: list[Timing] = Field(description="Measured on the host that the manifest names.")
    golden_tolerance: float = Field(
        description="Largest accepted difference from the golden outputs, relative to the largest "
        "output of the record, or to 1 where that is less."
    )

    @property
    def accepted(self) -> bool:
        return self.verdict == "accepted"

    @property
    def p50_ms(self) -> float:
        """Median latency of one record on one thread of its engine."""
        return self.ms(1)

    @property
    def records_per_s(self) -> float:
        """Throughput at batches of 32 on one thread of its engine."""
        return 32e3 / self.ms(32)

    def ms(self, batch_size: int) -> float:
        """Median milliseconds for a batch of one of the measured sizes, on one thread."""
        return next(
            timing.p50_ms
            for timing in self.profile
            if (timing.engine, timing.threads, timing.batch_size) == (self.engine, 1, batch_size)
        )


def rank_variants(variants: Mapping[str, Variant], optimize_for: str) -> list[str]:
    """The accepted variants, the best first.

    optimize_for: "latency" of one record, "throughput" of the best batch, both on one thread, or
    "size" in bytes, and of equal ones the throughput.
    """

    def cost(name: str) -> tuple[float, float]:
        variant = variants[name]
        of_engine = [t for t in variant.profile if (t.engine, t.threads) == (variant.engine, 1)]
        per_record_ms = min(timing.p50_ms / timing.batch_size for timing in of_engine)
        match optimize_for:
            case "latency":
                return variant.p50_ms, per_record_ms
            case "size":
                return float(variant.size_bytes), per_record_ms
            case _:
                return per_record_ms, variant.p50_ms

    return sorted((name for name, variant in variants.items() if variant.accepted), key=cost)


class SimpleModelFigures(StrictModel):
    """A simple model of the same records, to compare the net with."""

    name: str
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics.")
    seconds: float = Field(description="To fit it.")


class Manifest(StrictModel):
    format_version: int = FORMAT_VERSION
    name: str = Field(pattern=MODEL_NAME, description="As it is registered.")
    created: str = Field(description="UTC, ISO 8601.")
    task: dict[str, Any]
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    nullable: list[str] = Field(
        [], description="Inputs that training records lacked; requests may leave them out."
    )
    files: dict[str, BundleFile] = Field(description="Digest and size of every other file.")
    versions: dict[str, str] = Field(description="Of the packages that made it.")
    seed: int
    data: dict[str, Any] = Field(description="Source, digest and number of records per split.")
    config: dict[str, Any]
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics of the net itself.")
    simple_models: list[SimpleModelFigures] = Field(
        [], description="The better by validation loss first; none for images."
    )
    comparison: str = Field("", description="How the net did beside the better simple model.")
    variants: dict[Annotated[str, StringConstraints(pattern=FILE_NAME)], Variant]
    skipped: dict[str, str] = Field(description="Variants that could not be made, and why.")
    default_variant: str
    optimize_for: str = Field(description="By what the default variant was chosen.")
    eager: list[Timing] = Field(description="The net as torch runs it, uncompiled, to compare.")
    host: dict[str, Any] = Field(description="The machine that was measured.")
    training_seconds: float
    lineage: dict[str, Any] = Field(
        {},
        description="Where it comes from: the study and the trial that found its options; the "
        "bundle that its weights began from.",
    )

    @property
    def interface(self) -> dict[str, Any]:
        """What clients rely on: the task, the inputs with their types, the outputs, the classes."""
        target = self.task["target"]
        return {
            "task": target["kind"],
            "inputs": [each.model_dump() for each in self.inputs],
            "outputs": [each.model_dump() for each in self.outputs],
            "classes": target.get("classes"),
        }


def interface_change(before: Manifest, after: Manifest) -> str | None:
    """Say what differs between the interfaces of two bundles; None if nothing does."""
    one, other = before.interface, after.interface
    changed = [name for name in one if one[name] != other[name]]
    return f"its {' and '.join(changed)} differ{'s' * (changed == ['task'])}" if changed else None


def flatten_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options in sections by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        flat |= flatten_options(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
