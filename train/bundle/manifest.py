"""manifest.json: the contents of a bundle, its origin, and the measurements of each variant."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cluster.storage import FILE_NAME, MODEL_NAME
from train.tasks import TensorSpec

FORMAT_VERSION = 4
FILENAME = "manifest.json"
# Batch sizes whose latency is measured.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class StrictModel(BaseModel):
    """Base of all parts of a manifest. Unknown fields are errors; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorMetadata(StrictModel):
    """Name, datatype and shape of a tensor in requests; -1 stands for the batch dimension."""

    name: str
    datatype: str
    shape: list[int]

    @classmethod
    def of(cls, spec: TensorSpec) -> "TensorMetadata":
        """Return the metadata of a tensor, with the batch dimension added."""
        return cls(name=spec.name, datatype=spec.datatype, shape=[-1, *spec.shape])


class BundleFile(StrictModel):
    """Digest and size of one file of a bundle."""

    sha256: str
    size_bytes: int


class Timing(StrictModel):
    """Latency of one engine for one batch size: median, lower and upper quartile.

    length: positions of each record where lists differ in length, otherwise None.
    """

    engine: str
    threads: int
    batch_size: int
    length: int | None = None
    p50_ms: float
    low_ms: float
    high_ms: float


class Variant(StrictModel):
    """One form of the model: its engine and file, its measurements, and the gate's verdict."""

    engine: str = Field(description="Name of the engine that runs the variant.")
    file: str = Field(description="The file that the engine loads, relative to the bundle.")
    recipe: dict[str, Any] = Field(description="How the variant was made.")
    verdict: Literal["accepted", "refused", "undecided"]
    reason: str = Field(description="Why the gate decided so, with the figures.")
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics of the variant.")
    drop: list[float] = Field(
        description="How much worse the metric is than that of fp32, and the ends of the 95 % "
        "confidence interval. Measured on the validation split, and also on training records if "
        "`reason` says so."
    )
    agreement: float = Field(
        description="Fraction of these records with the same prediction as fp32; for numbers the "
        "R² between both predictions."
    )
    change: float = Field(
        description="Mean change of these predictions from fp32: half the sum of the absolute "
        "differences of probabilities, or of values in standard deviations of the target."
    )
    batch_difference: float | None = Field(
        description="Largest difference between predictions for the same record in batches of 1, 7 "
        "and 64; null if labels differ or a value is not finite."
    )
    size_bytes: int
    profile: list[Timing] = Field(
        description="Latencies on the host that the manifest describes; of records that differ in "
        "length, those of the median length come first."
    )
    golden_tolerance: float = Field(
        description="Largest accepted difference from the golden outputs, relative to the record's "
        "largest output, or to 1 if that is larger."
    )

    @property
    def accepted(self) -> bool:
        """Whether the gate accepted the variant."""
        return self.verdict == "accepted"

    @property
    def p50_ms(self) -> float:
        """Median latency of a single record, in milliseconds, on one thread."""
        return self.ms(1)

    @property
    def records_per_s(self) -> float:
        """Throughput in records per second, in batches of 32 on one thread."""
        return 32e3 / self.ms(32)

    def ms(self, batch_size: int) -> float:
        """Return the median latency of a batch in milliseconds, on one thread.

        batch_size: one of BATCH_SIZES.
        """
        timings = typical_timings(self.measured(1))
        return next(timing.p50_ms for timing in timings if timing.batch_size == batch_size)

    def measured(self, threads: int) -> list[Timing]:
        """Return the latencies of the variant's engine at the count nearest to `threads`."""
        timings = [timing for timing in self.profile if timing.engine == self.engine]
        nearest = min({t.threads for t in timings}, key=lambda count: abs(count - threads))
        return [timing for timing in timings if timing.threads == nearest]


def typical_timings(timings: Sequence[Timing]) -> list[Timing]:
    """Return the latencies for records of the median length, which are those of the first."""
    return [timing for timing in timings if timing.length == timings[0].length]


def rank_variants(variants: Mapping[str, Variant], optimize_for: str) -> list[str]:
    """Return the names of the accepted variants, the best first.

    optimize_for: "latency" ranks by the latency of a single record, "throughput" by the time per
    record at the best batch size, both on one thread; "size" ranks by bytes, then by throughput.
    """

    def cost(name: str) -> tuple[float, float]:
        variant = variants[name]
        timings = typical_timings(variant.measured(1))
        per_record_ms = min(timing.p50_ms / timing.batch_size for timing in timings)
        match optimize_for:
            case "latency":
                return variant.p50_ms, per_record_ms
            case "size":
                return float(variant.size_bytes), per_record_ms
            case _:
                return per_record_ms, variant.p50_ms

    return sorted((name for name, variant in variants.items() if variant.accepted), key=cost)


class SimpleModelFigures(StrictModel):
    """Figures of a simple model of the same records, to compare the network with."""

    name: str
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics.")
    seconds: float = Field(description="Seconds to fit the model.")


class ImportedModel(StrictModel):
    """Origin of a model that another library trained."""

    source: str = Field(description="The file or URI that it was imported from.")
    format: str
    sha256: str = Field(description="Digest of the model's file.")
    library: str = Field(description="The library that ran the original, with its version.")
    model: str = Field(description="Kind of the model, as its library calls it.")
    num_records: int = Field(description="Records on which it was compared with the original.")
    max_difference: float = Field(
        description="Largest difference from the original: of probabilities, or of values in "
        "standard deviations of the target; for a model without probabilities, that of labels is 0."
    )


class Manifest(StrictModel):
    """Content of manifest.json."""

    format_version: int = FORMAT_VERSION
    name: str = Field(pattern=MODEL_NAME, description="Name of the registered model.")
    created: str = Field(description="Time of creation, UTC, ISO 8601.")
    task: dict[str, Any]
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    nullable: list[str] = Field(
        [], description="Inputs with missing values in training; requests may leave them out."
    )
    files: dict[str, BundleFile] = Field(description="Digest and size of every other file.")
    versions: dict[str, str] = Field(description="Versions of the packages that made the bundle.")
    seed: int
    data: dict[str, Any] = Field(description="Source, digest and number of records per split.")
    config: dict[str, Any]
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics of fp32.")
    simple_models: list[SimpleModelFigures] = Field(
        [], description="Simple models, the best validation loss first; empty for images."
    )
    comparison: str = Field("", description="Result of the comparison with the best simple model.")
    variants: dict[Annotated[str, StringConstraints(pattern=FILE_NAME)], Variant]
    skipped: dict[str, str] = Field(description="Variants that could not be made, and why.")
    default_variant: str
    optimize_for: str = Field(description="Criterion by which the default variant was chosen.")
    eager: list[Timing] = Field(
        description="Latencies of the network in torch, not compiled; none for an imported model."
    )
    host: dict[str, Any] = Field(description="The machine on which latencies were measured.")
    training_seconds: float
    imported: ImportedModel | None = None
    lineage: dict[str, Any] = Field(
        {},
        description="Origin of the model: the study and the trial that found its options, or the "
        "bundle whose weights training started from.",
    )

    @property
    def interface(self) -> dict[str, Any]:
        """The parts that clients depend on: task, inputs and outputs with their types, classes."""
        target = self.task["target"]
        return {
            "task": target["kind"],
            "inputs": [each.model_dump() for each in self.inputs],
            "outputs": [each.model_dump() for each in self.outputs],
            "classes": target.get("classes"),
        }


def interface_change(before: Manifest, after: Manifest) -> str | None:
    """Return which parts of the interfaces of two bundles differ, or None if they are equal."""
    one, other = before.interface, after.interface
    changed = [name for name in one if one[name] != other[name]]
    return f"its {' and '.join(changed)} differ{'s' * (changed == ['task'])}" if changed else None


def flatten_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as a flat mapping by dotted name, such as "optim.lr"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        flat |= flatten_options(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
