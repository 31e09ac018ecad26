"""The torch engine: runs a network from its config and safetensors weights, without pickle.

It is used for precisions without ONNX Runtime kernels and for networks that cannot be exported to
ONNX. A variant consists of `net.json`, with the network's config, task and precision, and
`weights.safetensors` in the same folder.
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
    """Write a network in its inference form for TorchEngine; return the path of `net.json`.

    config: the config that the network was created with; its channels may have been pruned.
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
    """Runs a network with torch, on the GPU if there is one."""

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
        """Return {"logits": float32 [N, K]} for encoded arrays [N, ...] by input name."""
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
    """TorchEngine with torch.compile, which needs a C++ compiler, or a GPU for CUDA graphs."""

    def __init__(self, net: nn.Module, names: list[str], precision: str, num_threads: int) -> None:
        super().__init__(net, names, precision, num_threads)
        graphs = "reduce-overhead" if self._device.type == "cuda" else None
        # On a GPU, compile one CUDA graph for each batch size; on a CPU, one graph for all sizes.
        self._compiled = torch.compile(self._net, mode=graphs, dynamic=graphs is None)

    @classmethod
    def available(cls) -> bool:
        return torch.cuda.is_available() or which("g++") is not None or which("clang++") is not None

    def _forward(self, *tensors: Tensor) -> Tensor:
        return self._compiled(*tensors)


def _quantize(net: nn.Module, precision: str) -> None:
    """Quantize linear layers to int8 or fp8, and activations dynamically for each row (torchao)."""
    from torchao import quantization

    config = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "fp8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }[precision]
    quantization.quantize_(net, config())
