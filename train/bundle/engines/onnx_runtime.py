"""ONNX Runtime, on the processor or by one of its other execution providers."""

from pathlib import Path
from typing import Any, ClassVar, Self

import onnxruntime

from train.tasks import Arrays

CPU = "CPUExecutionProvider"


class OnnxRuntimeEngine:
    """ONNX Runtime on the processor."""

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
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Spinning threads take the cores from the other replicas and from the ingress.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # What a provider cannot compute, the processor does.
        providers = list(dict.fromkeys([cls.provider, CPU]))
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if cls.provider not in session.get_providers():  # it goes on without, in silence
            raise RuntimeError(f"{cls.provider} cannot be loaded on this machine")
        return cls(session, num_threads)

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"onnxruntime {onnxruntime.__version__}",
            "provider": self.provider,
            "threads": self._num_threads,
        }


class OpenVinoProviderEngine(OnnxRuntimeEngine):
    provider: ClassVar[str] = "OpenVINOExecutionProvider"


class CudaEngine(OnnxRuntimeEngine):
    provider: ClassVar[str] = "CUDAExecutionProvider"


class TensorRtEngine(OnnxRuntimeEngine):
    provider: ClassVar[str] = "TensorrtExecutionProvider"
