"""ONNX Runtime, on the CPU or with another execution provider. Shapes: N records of a batch."""

from pathlib import Path
from typing import Any, ClassVar, Self

import onnxruntime

from train.tasks import Arrays

CPU = "CPUExecutionProvider"


class OnnxRuntimeEngine:
    """ONNX Runtime on the CPU."""

    suffix: ClassVar[str] = ".onnx"
    provider: ClassVar[str] = CPU

    def __init__(self, session: onnxruntime.InferenceSession, num_threads: int) -> None:
        self._session = session
        self._num_threads = num_threads
        self._outputs = [output.name for output in session.get_outputs()]

    @classmethod
    def available(cls) -> bool:
        return cls.provider in onnxruntime.get_available_providers()

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self:
        """Load an ONNX file. Raises RuntimeError if the execution provider cannot be loaded."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Threads that spin while idle take CPU time from other replicas and from the ingress.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # The CPU runs the operators that the provider does not support.
        providers = list(dict.fromkeys([cls.provider, CPU]))
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if cls.provider not in session.get_providers():  # ONNX Runtime drops it silently
            raise RuntimeError(f"{cls.provider} cannot be loaded on this machine")
        return cls(session, num_threads)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs for a batch, both arrays [N, …] by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"onnxruntime {onnxruntime.__version__}",
            "provider": self.provider,
            "threads": self._num_threads,
        }


class OpenVinoProviderEngine(OnnxRuntimeEngine):
    """ONNX Runtime with OpenVINO as execution provider."""

    provider: ClassVar[str] = "OpenVINOExecutionProvider"


class CudaEngine(OnnxRuntimeEngine):
    """ONNX Runtime on an NVIDIA GPU."""

    provider: ClassVar[str] = "CUDAExecutionProvider"


class TensorRtEngine(OnnxRuntimeEngine):
    """ONNX Runtime with TensorRT on an NVIDIA GPU."""

    provider: ClassVar[str] = "TensorrtExecutionProvider"
