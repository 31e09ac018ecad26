"""Engines: what runs a variant. Arrays in, arrays out, one batch dimension first."""

from pathlib import Path
from typing import Protocol, Self

import onnxruntime

from train.tasks import Arrays


class Engine(Protocol):
    """Runs one variant of a net."""

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self: ...

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs for a batch. Safe to call from any one thread at a time."""
        ...


class OnnxRuntimeEngine:
    """ONNX Runtime on the processor."""

    name = "onnxruntime"

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Spinning threads take the cores from the other replicas and from the ingress.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return cls(
            onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        )

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


ENGINES: dict[str, type[Engine]] = {OnnxRuntimeEngine.name: OnnxRuntimeEngine}
