"""Static int8: weights per channel, activations by ranges measured on training records."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.recipes import activation_ranges
from train.compress.recipes.activation_ranges import batches
from train.tasks import Arrays

# Layers whose arithmetic is worth quantizing; what lies between them follows.
LAYERS = ("Conv", "Gemm", "MatMul")
# A layer with at most this share of all weights may stay in float though int8 would be accepted.
SMALL = 0.05


@dataclass(frozen=True)
class StaticQuantizer:
    """Makes static int8 forms of one ONNX file.

    method: how activation ranges were chosen, of `activation_ranges.METHODS`.
    error: how far the outputs are from the float net's, on records apart from the calibration;
    the power of the difference over that of the outputs.
    """

    prepared: Path
    trial: Arrays
    reference: np.ndarray
    method: str
    ranges: Any
    error: float

    @classmethod
    def calibrate(
        cls,
        source: Path,
        scratch: Path,
        calibration: Arrays,
        trial: Arrays,
        methods: Sequence[str],
    ) -> Self:
        """Measure activation ranges by each method and keep those that change outputs least.

        calibration: encoded training records; trial: others, to compare the methods on.
        """
        prepared = scratch / "prepared.onnx"
        with _quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            histograms = activation_ranges.measure_histograms(prepared, scratch, calibration)
        reference = _logits(source, trial)
        candidates = []
        for method in methods:
            ranges = activation_ranges.choose_ranges(histograms, method)
            made = cls(prepared, trial, reference, method, ranges, float("inf"))
            candidates.append(replace(made, error=made.error_without(())))
        return min(candidates, key=lambda candidate: np.nan_to_num(candidate.error, nan=np.inf))

    def write(self, target: Path, kept_float: Sequence[str] = ()) -> None:
        """Write the int8 form, in which the named layers stay in float, as QDQ.

        Activations are QUInt8, as x86 multiplies unsigned by signed bytes fastest: with QInt8 the
        same net runs slower than fp32. Weights have 7 bits: x86 processors without VNNI add such
        products in pairs of 16 bits, which cuts sums above 32,767, and 2·255·64 is below.
        """
        with _quiet():
            model = onnx.load(str(self.prepared))
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=True,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=list(kept_float),
                op_types_to_quantize=list(QDQRegistry),
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(str(target), False)
        onnx.checker.check_model(str(target))

    def error_without(self, kept_float: Sequence[str]) -> float:
        """The error of the form in which the named layers stay in float."""
        target = self.prepared.with_name("trial.onnx")
        self.write(target, kept_float)
        difference = _logits(target, self.trial) - self.reference
        spread = self.reference - self.reference.mean(axis=0)
        return float(np.sum(difference**2) / max(float(np.sum(spread**2)), 1e-12))

    def most_sensitive(self) -> list[str]:
        """The layers, those first without whose quantization the error falls most."""
        return sorted(self._sizes, key=lambda layer: self.error_without((layer,)))

    def ruling(self, layers: Sequence[str]) -> list[str]:
        """The first of `layers` that make more than half of the error each, if they are small.

        Often it is the first convolution, which costs next to nothing in float.
        """
        kept: list[str] = []
        error = self.error
        for layer in layers[: len(layers) // 2]:
            without = self.error_without((*kept, layer))
            if without > error / 2 or self._sizes[layer] > SMALL * sum(self._sizes.values()):
                break
            kept.append(layer)
            error = without
        return kept

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Values in the weights of each layer."""
        graph = onnx.load(str(self.prepared)).graph
        sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
        return {
            node.name: sum(sizes.get(name, 0) for name in node.input)
            for node in graph.node
            if node.op_type in LAYERS
        }


def _logits(path: Path, inputs: Arrays) -> np.ndarray:
    engine = OnnxRuntimeEngine.load(path, num_threads=1)
    return np.concatenate([engine.run(batch)["logits"] for batch in batches(inputs)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer prints what it does, and warns on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
