"""Export, int8 and the gate."""

import numpy as np
import onnx
import pytest
import torch

from train.compress import export, gate, quantize
from train.compress.measure import speeds
from train.nets import ConvNet
from train.tasks import TensorSpec

SPECS = (TensorSpec("image", "UINT8", (8, 8, 1)),)


@pytest.fixture
def images(rng):
    return {"image": rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)}


@pytest.fixture
def exported(tmp_path, images):
    torch.manual_seed(0)
    net = ConvNet((8, 8, 1), 10, [16, 16], whiten=True)
    net.fit_inputs(torch.from_numpy(images["image"]))
    path = tmp_path / "fp32.onnx"
    export.to_onnx(net.eval().folded(), SPECS, images, path)
    return path


def test_the_exported_net_takes_any_batch(exported, images):
    from train.bundle.engines import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine.load(exported, num_threads=1)
    for count in (1, 2, 40):
        part = {"image": images["image"][:count]}
        assert engine.run(part)["logits"].shape == (count, 10)


class Unstable(torch.nn.Module):
    """Answers differently each time it is traced or run."""

    calls = 0

    def forward(self, image):
        Unstable.calls += 1
        return image.float().flatten(1)[:, :10] * Unstable.calls


def test_an_export_that_differs_from_torch_is_refused(tmp_path, images):
    with pytest.raises(export.ExportError, match="differs from torch"):
        export.to_onnx(Unstable(), SPECS, images, tmp_path / "unstable.onnx")


def test_int8_has_unsigned_activations_and_weights_per_channel(exported, tmp_path, images):
    path = tmp_path / "int8.onnx"
    quantize.int8_static(exported, path, images)
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [
        constants[node.input[0]]
        for node in dequantized
        if node.input[0] in constants and len(constants[node.input[0]].dims) == 4
    ]
    assert len(weights) == 5, "the stem and two convolutions in each block"
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}
    for node in dequantized:
        if node.input[0] in {tensor.name for tensor in weights}:
            scale = constants[node.input[1]]
            assert list(scale.dims) == [constants[node.input[0]].dims[0]]
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    zero_points = {constants[node.input[2]].data_type for node in activations}
    assert zero_points == {onnx.TensorProto.UINT8}
    assert path.stat().st_size < exported.stat().st_size


@pytest.mark.parametrize(
    ("value", "accepted"),
    [(0.99, True), (0.985, True), (0.9849, False), (1.0, True), (float("nan"), False)],
)
def test_the_gate_accepts_up_to_the_allowed_drop(value, accepted):
    verdict = gate.judge("valid_accuracy", 0.99, value, 0.005)
    assert verdict.accepted is accepted
    assert "0.9900" in verdict.reason


class Slow:
    """Takes a fixed number of matrix products for each row."""

    def __init__(self, work: int) -> None:
        self._matrix = np.ones((work, work))

    def run(self, inputs):
        for _ in range(len(inputs["image"])):
            self._matrix @ self._matrix
        return {}


def test_the_faster_engine_measures_faster(images):
    measured = speeds({"slow": Slow(160), "fast": Slow(40)}, images)
    assert measured["fast"].records_per_s > measured["slow"].records_per_s
    assert measured["fast"].p50_ms < measured["slow"].p50_ms
