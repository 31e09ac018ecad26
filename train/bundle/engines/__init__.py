"""Engines, which run variants. Inputs and outputs are arrays whose first dimension is the batch.

A new engine is a class in a file of its own, listed in ENGINES. It is imported only when a variant
uses it, so that a server loads only the packages that it needs. Shapes: N records of a batch.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from train.tasks import Arrays
from train.values.ragged import StoredArrays, by_length, in_place
from train.values.records import concatenate, num_rows

# Records of a batch where there are many.
BATCH_ROWS = 256


class Engine(Protocol):
    """Runs one variant of a model."""

    suffix: ClassVar[str]
    """Suffix of the files that the engine reads, such as ".onnx"."""

    @classmethod
    def available(cls) -> bool:
        """Return whether the engine can run on this machine."""
        ...

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self:
        """Load a variant's file. Errors are those of the library."""
        ...

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs for a batch, both arrays [N, …] by name.

        It may be called from any thread, but only from one at a time.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what runs the variant: engine version, device or provider, threads, precision."""
        ...


ENGINES = {
    "onnxruntime": "train.bundle.engines.onnx_runtime:OnnxRuntimeEngine",
    "onnxruntime-openvino": "train.bundle.engines.onnx_runtime:OpenVinoProviderEngine",
    "onnxruntime-cuda": "train.bundle.engines.onnx_runtime:CudaEngine",
    "onnxruntime-tensorrt": "train.bundle.engines.onnx_runtime:TensorRtEngine",
    "openvino": "train.bundle.engines.openvino:OpenVinoEngine",
    "torch": "train.nets.torch_engine:TorchEngine",
    "torch-compiled": "train.nets.torch_engine:CompiledTorchEngine",
}


def find_engine(name: str) -> type[Engine]:
    """Return an engine's class.

    Raises ValueError for an unknown name, ImportError if the engine's package is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine '{name}' is unknown; expected one of {', '.join(ENGINES)}")
    module, _, kind = ENGINES[name].partition(":")
    engine: type[Engine] = getattr(import_module(module), kind)
    return engine


def run_batches(run: Callable[[Arrays], Arrays], inputs: StoredArrays) -> Arrays:
    """Return the outputs for any number of records, [N, …] by name, computed in batches.

    run: returns the outputs of a batch, such as `Engine.run`. inputs: encoded arrays [N, …] by
    name, N ≥ 1. Records that differ in length are batched with others of about their length.
    """
    count, order = num_rows(inputs), by_length(inputs)
    parts = []
    for start in range(0, count, BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        rows = part if order is None else order[part]
        parts.append(run({name: array[rows] for name, array in inputs.items()}))
    return {name: in_place(array, order) for name, array in concatenate(parts).items()}


def engines_for(path: Path) -> list[str]:
    """Return the names of this machine's engines that read files with the suffix of `path`."""
    names = []
    for name in ENGINES:
        try:
            engine = find_engine(name)
        except ImportError:
            continue
        if engine.suffix == path.suffix and engine.available():
            names.append(name)
    return names
