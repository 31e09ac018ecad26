"""OpenVINO, which reads ONNX files itself, if its package is installed. Shapes: N records."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

from train.tasks import Arrays


class OpenVinoEngine:
    """OpenVINO on the CPU."""

    suffix: ClassVar[str] = ".onnx"

    def __init__(self, compiled: Any, num_threads: int) -> None:
        self._request = compiled.create_infer_request()
        self._outputs = {output: output.get_any_name() for output in compiled.outputs}
        self._num_threads = num_threads

    @classmethod
    def available(cls) -> bool:
        return find_spec("openvino") is not None

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self:
        import openvino

        options = {
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            # The default is bf16 on CPUs that support it, which changes the outputs.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        return cls(openvino.Core().compile_model(str(path), "CPU", options), num_threads)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs for a batch, both arrays [N, …] by name."""
        results = self._request.infer(inputs, share_inputs=True)
        return {name: results[output].copy() for output, name in self._outputs.items()}

    def describe(self) -> dict[str, Any]:
        import openvino

        return {
            "engine": f"openvino {openvino.get_version()}",
            "provider": "CPU",
            "threads": self._num_threads,
        }
