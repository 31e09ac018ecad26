"""Static int8 quantization: weights per channel, activations by ranges of training records.

Shapes: N records.
"""

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
from train.values.ragged import StoredArrays

# Operators whose layers may be kept in float; other operators are quantized with them.
LAYERS = ("Conv", "Gemm", "MatMul")
# A layer with at most this share of all weights may stay in float even if int8 is accepted.
SMALL = 0.05


@dataclass(frozen=True)
class StaticQuantizer:
    """Writes static int8 versions of one ONNX file.

    prepared: the preprocessed float file. trial: records for the comparison with float, separate
    from calibration if there are enough. reference: the float logits of these records.
    method, ranges: how activation ranges were chosen, one of `activation_ranges.METHODS`.
    error: sum of squared differences between int8 and float outputs on `trial`, divided by the sum
    of squared deviations of the float outputs from their mean.
    """

    prepared: Path
    trial: StoredArrays
    reference: np.ndarray
    method: str
    ranges: Any
    error: float

    @classmethod
    def calibrate(
        cls,
        source: Path,
        scratch: Path,
        calibration: StoredArrays,
        trial: StoredArrays,
        methods: Sequence[str],
    ) -> Self:
        """Choose activation ranges with each method and keep those with the smallest error.

        source: the float ONNX file. scratch: a folder for temporary files.
        calibration, trial: encoded arrays [N, ...] by input name, of training records to measure
        ranges on and of others to compare the methods on.
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
        """Write the int8 version to `target` in QDQ format, with the named layers in float.

        Activations are QUInt8, because x86 multiplies unsigned by signed bytes fastest; with QInt8
        the same network is slower than in fp32. Weights have 7 bits, because x86 processors without
        VNNI add pairs of products in 16 bits, where sums above 32,767 saturate. 2·255·64 does not.
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
        """Return the error of the int8 version with the named layers in float."""
        target = self.prepared.with_name("trial.onnx")
        self.write(target, kept_float)
        difference = _logits(target, self.trial) - self.reference
        spread = self.reference - self.reference.mean(axis=0)
        return float(np.sum(difference**2) / max(float(np.sum(spread**2)), 1e-12))

    def most_sensitive(self) -> list[str]:
        """Return the layers, first the one whose exclusion from int8 reduces the error most."""
        return sorted(self._sizes, key=lambda layer: self.error_without((layer,)))

    def ruling(self, layers: Sequence[str]) -> list[str]:
        """Return the first of `layers` that each cause more than half of the remaining error.

        Layers with more than SMALL of all weights are not included. Often the result is only the
        first convolution, which costs little time in float.
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
        """The number of weights of each layer."""
        graph = onnx.load(str(self.prepared)).graph
        sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
        return {
            node.name: sum(sizes.get(name, 0) for name in node.input)
            for node in graph.node
            if node.op_type in LAYERS
        }


def _logits(path: Path, inputs: StoredArrays) -> np.ndarray:
    engine = OnnxRuntimeEngine.load(path, num_threads=1)
    return np.concatenate([engine.run(batch)["logits"] for batch in batches(inputs)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the quantizer's output and its warnings on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
