"""manifest.json: what a bundle holds, what it was made of, and how each variant measured."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from train.tasks import TensorSpec

FORMAT_VERSION = 1
FILENAME = "manifest.json"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(Strict):
    """A tensor on the wire; -1 is the free batch dimension."""

    name: str
    datatype: str
    shape: list[int]

    @classmethod
    def of(cls, spec: TensorSpec) -> "Tensor":
        return cls(name=spec.name, datatype=spec.datatype, shape=[-1, *spec.shape])


class File(Strict):
    sha256: str
    size_bytes: int


class Variant(Strict):
    """One form of the net: what runs it, what it measured, and what the gate said."""

    engine: str = Field(description="Name of the engine that runs it.")
    file: str = Field(description="The engine's file, relative to the bundle.")
    accepted: bool
    reason: str = Field(description="Why the gate accepted or refused it.")
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics of this variant.")
    size_bytes: int
    p50_ms: float = Field(description="Median latency of one record, one thread, in ms.")
    records_per_s: float = Field(description="Throughput at batch 32, one thread.")
    golden_tolerance: float = Field(
        description="Largest accepted difference from the golden outputs, absolute."
    )


class Manifest(Strict):
    format_version: int = FORMAT_VERSION
    name: str
    created: str = Field(description="UTC, ISO 8601.")
    task: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    files: dict[str, File] = Field(description="Digest and size of every other file.")
    versions: dict[str, str] = Field(description="Of the packages that made it.")
    seed: int
    data: dict[str, Any] = Field(description="Source, digest and number of records per split.")
    config: dict[str, Any]
    metrics: dict[str, float] = Field(description="valid_… and test_… metrics of the net itself.")
    variants: dict[str, Variant]
    default_variant: str
    training_seconds: float
