"""Engines: what runs a variant. Arrays in, arrays out, one batch dimension first.

A new engine is one file with a class, named here. It is imported when a variant asks for it, so
that a server holds only what it needs.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from train.tasks import Arrays


class Engine(Protocol):
    """Runs one variant of a net."""

    suffix: ClassVar[str]
    """How the files end that it reads."""

    @classmethod
    def available(cls) -> bool:
        """Whether this machine has what it takes."""
        ...

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self: ...

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs for a batch. Safe to call from any one thread at a time."""
        ...

    def describe(self) -> dict[str, Any]:
        """What runs it: device or provider, threads, precision."""
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
    """Return an engine's class. Raises ValueError for an unknown name, ImportError without it."""
    if name not in ENGINES:
        raise ValueError(f"engine '{name}' is unknown; known are {', '.join(ENGINES)}")
    module, _, kind = ENGINES[name].partition(":")
    engine: type[Engine] = getattr(import_module(module), kind)
    return engine


def engines_for(path: Path) -> list[str]:
    """The names of the engines of this machine that read a file such as `path`."""
    names = []
    for name in ENGINES:
        try:
            engine = find_engine(name)
        except ImportError:
            continue
        if engine.suffix == path.suffix and engine.available():
            names.append(name)
    return names
