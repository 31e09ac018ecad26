"""The torch engine: a net as it was built, its weights from safetensors, nothing unpickled.

For precisions that ONNX Runtime has no kernels for, and for nets that cannot be exported. A variant
is `net.json` (what to build, and in which precision) and `weights.safetensors` beside it.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from shutil import which
from typing import Any, ClassVar, Literal, Self

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from train import nets
from train.bundle.bundle import WEIGHTS
from train.config import Net
from train.tasks import Arrays, Task

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
FILE = "net.json"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def save_net(net: nn.Module, config: Net, task: Task, precision: Precision, folder: Path) -> Path:
    """Write a net in its inference form so that TorchEngine reads it; return the engine's file.

    config: what the net was built by; channels may have been removed since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = HALVES.get(precision)
    # Buffers, such as the edges of bins, keep their precision.
    matrices = {name for name, param in net.named_parameters() if param.ndim > 1}
    weights = {
        name: value.to(dtype) if dtype and name in matrices else value
        for name, value in net.state_dict().items()
    }
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS
    )
    state = {
        "precision": precision,
        "net": config.model_dump(mode="json"),
        "task": task.to_dict(),
    }
    (folder / FILE).write_text(json.dumps(state) + "\n")
    return folder / FILE


class TorchEngine:
    """A net run by torch, on the GPU if there is one."""

    suffix: ClassVar[str] = ".json"

    def __init__(self, net: nn.Module, names: list[str], precision: str, num_threads: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._net = net.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._names, self._precision, self._num_threads = names, precision, num_threads
        if precision in ("int8", "fp8"):
            _quantize(self._net, precision)
        half = HALVES.get(precision)
        self._autocast = torch.autocast(self._device.type, half) if half else nullcontext()

    @classmethod
    def available(cls) -> bool:
        return True

    @classmethod
    def load(cls, path: Path, *, num_threads: int) -> Self:
        state = json.loads(path.read_text())
        task = Task.from_dict(state["task"])
        net = nets.folded_net(nets.create_net(Net.model_validate(state["net"]), task))
        weights = safetensors.torch.load_file(path.with_name(WEIGHTS))
        nets.resize_net(
            net,
            {
                name: value.float() if value.dtype in HALVES.values() else value
                for name, value in weights.items()
            },
        )
        names = [spec.name for spec in task.features.inputs]
        return cls(net.eval(), names, state["precision"], num_threads)

    @torch.inference_mode()
    def run(self, inputs: Arrays) -> Arrays:
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        arrays = [np.require(inputs[name], requirements="W") for name in self._names]
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        with self._autocast:
            return {"logits": self._forward(*tensors).float().cpu().numpy()}

    def _forward(self, *tensors: Tensor) -> Tensor:
        return self._net(*tensors)

    def describe(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if self._device.type == "cuda" else "CPU"
        return {
            "engine": f"torch {torch.__version__}",
            "provider": device,
            "threads": self._num_threads,
            "precision": self._precision,
        }


class CompiledTorchEngine(TorchEngine):
    """The same, compiled: into CUDA graphs on a GPU. It needs a C++ compiler or a GPU."""

    def __init__(self, net: nn.Module, names: list[str], precision: str, num_threads: int) -> None:
        super().__init__(net, names, precision, num_threads)
        graphs = "reduce-overhead" if self._device.type == "cuda" else None
        # On a GPU one graph for each size of batch, on a processor one for all.
        self._compiled = torch.compile(self._net, mode=graphs, dynamic=graphs is None)

    @classmethod
    def available(cls) -> bool:
        return torch.cuda.is_available() or which("g++") is not None or which("clang++") is not None

    def _forward(self, *tensors: Tensor) -> Tensor:
        return self._compiled(*tensors)


def _quantize(net: nn.Module, precision: str) -> None:
    """Bring linear layers to int8 or fp8, activations by row as they come; by torchao."""
    from torchao import quantization

    config = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "fp8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }[precision]
    quantization.quantize_(net, config())
