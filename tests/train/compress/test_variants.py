"""Compressed variants and their measurement, against numpy, torch and each other."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from tests.conftest import make_config
from train import nets
from train.bundle import BundleWriter
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.benchmark import BATCH_SIZES, BenchmarkCase, benchmark_variants
from train.compress.pipeline import compress
from train.compress.recipes import (
    activation_ranges,
    export_onnx,
    finetune,
    prune,
    quantize_weight_only,
)
from train.compress.recipes.calibration import EXTREME_RECORDS, find_extremes
from train.compress.recipes.quantize_static import StaticQuantizer
from train.compress.recipes.variant_builder import TRIAL_RECORDS, VariantBuilder
from train.compress.recipes.variants import RECIPES
from train.config import Net
from train.loop.checkpoint import CheckpointManager
from train.loop.checkpoint import load_best_weights as trained_in
from train.loop.loop import Loop
from train.loop.net_setup import build_net
from train.loop.parallelism import Worker
from train.loop.run_directory import DistillationConfig
from train.nets import ConvNet, fake_quant, torch_engine
from train.nets.losses import distillation_loss
from train.tasks import ClassTarget, TensorSpec
from train.tasks.regression import ValueTarget

SPECS = (TensorSpec("image", "UINT8", (8, 8, 1)),)
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def images(rng):
    return {"image": rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)}


@pytest.fixture
def net(images):
    torch.manual_seed(0)
    net = ConvNet((8, 8, 1), 10, [16, 16], whiten=True)
    net.fit_inputs(torch.from_numpy(images["image"]))
    return net.eval()


@pytest.fixture
def exported(net, tmp_path, images):
    path = tmp_path / "fp32.onnx"
    export_onnx.to_onnx(net.folded(), SPECS, images, path)
    return path


def logits(path, inputs):
    return OnnxRuntimeEngine.load(path, num_threads=1).run(inputs)["logits"]


# Export


def test_the_exported_net_accepts_any_batch_size(exported, images):
    engine = OnnxRuntimeEngine.load(exported, num_threads=1)
    for count in (1, 2, 40):
        part = {"image": images["image"][:count]}
        assert engine.run(part)["logits"].shape == (count, 10)


class Unstable(torch.nn.Module):
    """A net whose outputs differ each time it is traced or run."""

    calls = 0

    def forward(self, image):
        Unstable.calls += 1
        return image.float().flatten(1)[:, :10] * Unstable.calls


def test_an_export_that_differs_from_torch_is_refused(tmp_path, images):
    with pytest.raises(export_onnx.ExportError, match="differs from torch"):
        export_onnx.to_onnx(Unstable(), SPECS, images, tmp_path / "unstable.onnx")


class Eigenvalues(torch.nn.Module):
    """A net with an operation that ONNX has no operator for."""

    def __init__(self, task=None):
        super().__init__()
        self.head = torch.nn.Linear(8, 10)

    def forward(self, image):
        square = image.float()[..., 0] / 16
        return self.head(torch.linalg.eigvalsh(square + square.mT))


def test_an_operator_that_cannot_be_exported_is_named(tmp_path, images):
    with pytest.raises(export_onnx.ExportError, match=r"aten\._linalg_eigh"):
        export_onnx.to_onnx(Eigenvalues(), SPECS, images, tmp_path / "net.onnx")


# Static int8


@pytest.fixture
def quantizer(exported, tmp_path, images):
    methods = ("minmax", "percentile", "squared_error")
    return StaticQuantizer.calibrate(exported, tmp_path, images, images, methods)


def test_int8_has_unsigned_activations_and_weights_per_channel(quantizer, exported, tmp_path):
    path = tmp_path / "int8.onnx"
    quantizer.write(path)
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    kernels = [
        constants[node.input[0]]
        for node in dequantized
        if node.input[0] in constants and len(constants[node.input[0]].dims) == 4
    ]
    assert len(kernels) == 5, "the stem and two convolutions in each block"
    assert {tensor.data_type for tensor in kernels} == {onnx.TensorProto.INT8}
    for node in dequantized:
        if node.input[0] in {tensor.name for tensor in kernels}:
            scale = constants[node.input[1]]
            assert list(scale.dims) == [constants[node.input[0]].dims[0]]
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    zero_points = {constants[node.input[2]].data_type for node in activations}
    assert zero_points == {onnx.TensorProto.UINT8}
    assert path.stat().st_size < exported.stat().st_size


@pytest.mark.parametrize("method", activation_ranges.METHODS)
def test_ranges_do_not_depend_on_the_order_of_records(exported, tmp_path, images, method, rng):
    images = {"image": np.sort(images["image"], axis=0)}  # the darkest first
    found = []
    for order in (np.arange(40), np.arange(40)[::-1], rng.permutation(40)):
        ordered = {"image": images["image"][order]}
        histograms = activation_ranges.measure_histograms(exported, tmp_path, ordered)
        ranges = activation_ranges.choose_ranges(histograms, method)
        found.append(np.array([[*ranges[name].range_value] for name in ranges]))
    np.testing.assert_allclose(found[1], found[0], rtol=0.01, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=0.01, atol=1e-5)


def histogram_of(values):
    ends = float(values.min()), float(values.max())
    counts = np.histogram(values, activation_ranges.NUM_BINS, ends)[0]
    return activation_ranges._Histogram(*ends, counts)


def rounding_error(values, low, high):
    """Return the mean squared error of rounding values to int8 with these ends."""
    step = (high - low) / 255
    rounded = np.clip(np.round((values - low) / step), 0, 255) * step + low
    return np.mean((rounded - values) ** 2)


def test_the_range_of_least_squared_error_is_near_the_best(rng):
    """For values with an outlier, against the rounding error of many ranges."""
    values = np.r_[rng.laplace(size=200_000), [25.0]]
    low, high = activation_ranges.squared_error(histogram_of(values))
    tried = [
        rounding_error(values, *(share * np.array([values.min(), 25])))
        for share in np.linspace(0.05, 1, 100)
    ]
    assert rounding_error(values, low, high) < 1.1 * min(tried)
    assert rounding_error(values, low, high) < 0.9 * rounding_error(values, values.min(), 25)
    uniform = rng.uniform(0, 1, 20_000)
    assert activation_ranges.squared_error(histogram_of(uniform))[1] > 0.97


@pytest.mark.parametrize(("count", "share"), [(1000, 1e-3), (64_000, 5e-4), (10_000_000, 1e-5)])
def test_a_percentile_fits_the_number_of_values(count, share, rng):
    values = rng.normal(size=count)
    low, high = activation_ranges.percentile(histogram_of(values))
    bin_width = (values.max() - values.min()) / activation_ranges.NUM_BINS
    assert np.mean(values < low) <= share <= np.mean(values < low + 1.01 * bin_width)
    assert np.mean(values > high) <= share <= np.mean(values > high - 1.01 * bin_width)
    assert activation_ranges.minmax(histogram_of(values)) == (values.min(), values.max())


def test_the_calibration_that_changes_outputs_least_is_kept(exported, tmp_path, images):
    alone = {
        method: StaticQuantizer.calibrate(exported, tmp_path, images, images, (method,)).error
        for method in ("minmax", "percentile", "squared_error")
    }
    best = StaticQuantizer.calibrate(exported, tmp_path, images, images, tuple(alone))
    assert best.method == min(alone, key=alone.__getitem__)
    assert best.error == pytest.approx(min(alone.values()))
    assert len(set(alone.values())) > 1


def test_the_most_sensitive_layer_is_found_and_stays_in_float(net, tmp_path, images):
    folded = net.folded()
    with torch.no_grad():  # one huge value, whose range leaves no steps to the others
        folded.second[0].bias[0] = 1e5
    path = tmp_path / "net.onnx"
    export_onnx.to_onnx(folded, SPECS, images, path)
    quantizer = StaticQuantizer.calibrate(path, tmp_path, images, images, ("minmax",))
    layers = quantizer.most_sensitive()
    assert len(layers) == 6
    assert quantizer.error_without(layers[:1]) < quantizer.error
    errors = [quantizer.error_without((layer,)) for layer in layers]
    assert errors == sorted(errors)
    quantizer.write(tmp_path / "kept.onnx", layers[:2])
    kept = onnx.load(tmp_path / "kept.onnx").graph
    floats = [tensor for tensor in kept.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert sum(len(tensor.dims) >= 2 for tensor in floats) >= 1


# Int8 weights


@pytest.fixture
def table(rng, tmp_path):
    """A net of an embedding and linear layers, its input arrays and its ONNX file."""

    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(300, 32)
            self.first = torch.nn.Linear(32, 64)
            self.head = torch.nn.Linear(64, 3)

        def forward(self, codes):
            return self.head(F.relu(self.first(self.table(codes).mean(dim=1))))

    torch.manual_seed(0)
    net = Words().eval()
    arrays = {"codes": rng.integers(0, 300, (64, 5), dtype=np.int32)}
    path = tmp_path / "table.onnx"
    export_onnx.to_onnx(net, (TensorSpec("codes", "INT32", (5,)),), arrays, path)
    return net, arrays, path


def rounded(weight, axis, steps=127):
    """Return weights rounded with one scale per index of `axis`. steps: on each side of zero."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(steps)
    return np.rint(weight / scale) * scale


def test_int8_weights_matches_the_net_with_rounded_weights(table, tmp_path):
    net, arrays, path = table
    quantize_weight_only.int8_weights(path, tmp_path / "int8.onnx")
    with torch.no_grad():
        for layer in (net.table, net.first):
            layer.weight.copy_(torch.from_numpy(rounded(layer.weight.numpy(), 0)))
        expected = net(torch.from_numpy(arrays["codes"])).numpy()
    np.testing.assert_allclose(logits(tmp_path / "int8.onnx", arrays), expected, atol=1e-5)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size


def test_int8_dynamic_scales_each_record_separately(table, tmp_path):
    net, arrays, path = table
    quantize_weight_only.int8_dynamic(path, tmp_path / "int8.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert "MatMulInteger" in kinds
    with torch.no_grad():
        table_VD = rounded(net.table.weight.numpy(), 0)
        x = table_VD[arrays["codes"]].mean(axis=1)
        scale = np.abs(x).max(axis=1, keepdims=True) / 127
        hidden = np.rint(x / scale) * scale @ rounded(net.first.weight.numpy(), 0).T
        hidden = np.maximum(hidden + net.first.bias.numpy(), 0)
        expected = hidden @ net.head.weight.numpy().T + net.head.bias.numpy()
    np.testing.assert_allclose(logits(tmp_path / "int8.onnx", arrays), expected, atol=2e-3)
    whole = logits(tmp_path / "int8.onnx", arrays)
    alone = logits(tmp_path / "int8.onnx", {"codes": arrays["codes"][:1]})
    np.testing.assert_allclose(whole[:1], alone, atol=1e-6)


def products(weight_dtype, zero, weight_DK, activations_BD):
    """Return ONNX Runtime's integer products on this processor, with activations around 128."""
    tensors = [
        numpy_helper.from_array((weight_DK + zero).astype(weight_dtype), "weight"),
        numpy_helper.from_array(np.uint8(128), "zero"),
    ]
    zeros = ["zero", "zero"] if zero else ["zero"]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight", *zeros], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["B", len(weight_DK)])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["B", weight_DK.shape[1]])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": activations_BD})[0]


def saturated(weight_DK, activations_BD):
    """Return products as x86 without VNNI adds them: pairs of products saturate at 16 bits."""
    x_BDK = activations_BD.astype(np.int64)[:, :, None] * weight_DK.astype(np.int64)
    pairs = np.clip(x_BDK[:, 0::2] + x_BDK[:, 1::2], -(2**15), 2**15 - 1)
    return pairs.sum(axis=1) - 128 * weight_DK.astype(np.int64).sum(axis=0)


def test_integer_products_are_exact_on_every_processor(rng):
    """Unsigned bytes of the full range, as int8_dynamic writes; signed weights may saturate."""
    weight_DK = rng.integers(-127, 128, (512, 16))
    activations_BD = rng.integers(1, 256, (8, 512)).astype(np.uint8)
    exact = (activations_BD.astype(np.int64) - 128) @ weight_DK
    np.testing.assert_array_equal(products(np.uint8, 128, weight_DK, activations_BD), exact)
    cut = saturated(weight_DK, activations_BD)
    assert (cut != exact).mean() > 0.5
    # With signed weights the processor decides whether the result is exact or saturated.
    signed = products(np.int8, 0, weight_DK, activations_BD)
    assert np.array_equal(signed, exact) or np.array_equal(signed, cut)


def test_static_int8_weights_saturate_on_no_processor(table, tmp_path, rng):
    """Weights have 7 bits, so that the sum of any two products fits in 16 bits."""
    _, inputs, source = table
    quantizer = StaticQuantizer.calibrate(source, tmp_path, inputs, inputs, ["minmax"])
    quantizer.write(tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [w for w in tensors.values() if w.dtype == np.int8 and w.ndim == 2 and len(w) > 1]
    assert weights
    for weight_DK in weights:
        assert np.abs(weight_DK.astype(int)).max() <= 64
        weight_DK = weight_DK[: len(weight_DK) // 2 * 2]
        activations_BD = rng.choice([0, 255], (8, len(weight_DK))).astype(np.uint8)
        exact = (activations_BD.astype(np.int64) - 128) @ weight_DK
        np.testing.assert_array_equal(saturated(weight_DK, activations_BD), exact)


def test_quantization_aware_training_rounds_as_static_int8_does(table, tmp_path):
    net, inputs, source = table
    quantizer = StaticQuantizer.calibrate(source, tmp_path, inputs, inputs, ["minmax"])
    quantizer.write(tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    written = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            weight, scale = tensors[node.input[0]], tensors[node.input[1]]
            if weight.shape in ((32, 64), (64, 32)):
                weight = weight if weight.shape == (64, 32) else weight.T
                written.append(weight * scale.reshape(-1, 1))
    assert len(written) == 1
    expected = fake_quant._weight(net.first.weight).detach().numpy()
    np.testing.assert_allclose(written[0], expected, atol=1e-6)


def test_int8_dynamic_multiplies_unsigned_operands(table, tmp_path):
    quantize_weight_only.int8_dynamic(table[2], tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    tensors = {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert nodes
    for node in nodes:
        _, weight, *zeros = node.input
        assert [tensors[name] for name in (weight, *zeros)] == [TensorProto.UINT8] * 3


# Measurement


class Slow:
    """Engine that computes a matrix product of fixed size for each row."""

    def __init__(self, work: int) -> None:
        self._matrix = np.ones((work, work))

    def run(self, inputs):
        for _ in range(len(inputs["image"])):
            self._matrix @ self._matrix
        return {}


def test_the_faster_engine_measures_faster(images):
    engines = {
        BenchmarkCase(name, "e", 1): Slow(work) for name, work in (("slow", 160), ("fast", 40))
    }
    slow, fast = benchmark_variants(engines, images, seconds=0.1).values()
    assert [timing.batch_size for timing in slow] == list(BATCH_SIZES)
    for one, other in zip(slow, fast, strict=True):
        assert other.p50_ms < one.p50_ms
        assert one.low_ms <= one.p50_ms <= one.high_ms


# Pruning, distillation, quantization-aware training


def test_pruned_weights_load_into_a_resized_net(images):
    torch.manual_seed(0)
    net = ConvNet((8, 8, 1), 10, [32, 64], whiten=True)
    pixels = torch.from_numpy(images["image"])
    net.fit_inputs(pixels)
    before = sum(param.numel() for param in net.parameters())
    stem = net.stem.weight.clone()
    prune.remove_channels(net, (pixels,), torch.arange(40) % 10, F.cross_entropy, 0.5)
    assert [block.conv1.out_channels for block in net.blocks] == [16, 32]
    assert net.head.weight.shape == (10, 32)
    torch.testing.assert_close(net.stem.weight, stem)
    assert not net.stem.weight.requires_grad
    assert sum(param.numel() for param in net.parameters()) < 0.4 * before
    again = ConvNet((8, 8, 1), 10, [32, 64], whiten=True)
    nets.resize_net(again, net.state_dict())
    torch.testing.assert_close(again.eval()(pixels), net.eval()(pixels))
    torch.testing.assert_close(again.folded()(pixels), net(pixels), rtol=1e-4, atol=1e-4)


def test_pruning_removes_unused_channels_first(images):
    """Channels that no later layer uses are removed before the others."""
    torch.manual_seed(0)
    net = ConvNet((8, 8, 1), 10, [32, 32], whiten=True)
    pixels = torch.from_numpy(images["image"])
    net.fit_inputs(pixels)
    unread = torch.arange(32) % 2 == 0
    with torch.no_grad():
        net.head.weight[:, unread] = 0
        net.blocks[1].conv2.weight[unread] = 0
    kept = net.head.weight[:, ~unread].clone()
    prune.remove_channels(net, (pixels,), torch.arange(40) % 10, F.cross_entropy, 0.5)
    torch.testing.assert_close(net.head.weight, kept)


def test_pruning_an_unsupported_net_raises_unprunable():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with pytest.raises(prune.Unprunable):
        prune.remove_channels(net, (torch.ones(3, 4),), torch.zeros(3).long(), F.cross_entropy, 0.3)


def test_distillation_loss_is_the_divergence_from_the_teacher(rng):
    student, teacher = (torch.from_numpy(rng.normal(size=(6, 3))) for _ in range(2))
    loss = distillation_loss(ClassTarget("y", ("a", "b", "c"), (1, 1, 1)), 2.0)
    p, q = (np.exp(x.numpy() / 2) for x in (teacher, student))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    expected = 4 * np.mean(np.sum(p * np.log(p / q), axis=1))
    assert loss(student, teacher).item() == pytest.approx(expected)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert distillation_loss(ValueTarget("y"), 2.0)(student, teacher).item() == pytest.approx(
        np.mean((student.numpy() - teacher.numpy()) ** 2)
    )


def run_loop(config, shards, folder, lesson):
    store = CheckpointManager(str(folder), keep=1)
    Loop(config, shards, ALONE, store, num_micro_batches=2, lesson=lesson).run()
    return trained_in(store)[0]


def test_a_student_learns_what_only_its_teacher_knows(digits, config, tmp_path):
    """The teacher predicts classes shifted by one, which the targets contradict."""
    teacher = build_net(config, digits.task)
    inputs, targets_N = digits.open("train")
    teacher.load_state_dict(run_loop(config, digits, tmp_path / "teacher", DistillationConfig()))
    with torch.no_grad():
        teacher.head.weight.copy_(teacher.head.weight.roll(1, 0))
        teacher.head.bias.copy_(teacher.head.bias.roll(1, 0))
    (tmp_path / "taught").mkdir()
    save_file(teacher.state_dict(), tmp_path / "taught/weights.safetensors")
    lesson = DistillationConfig(
        teacher=str(tmp_path / "taught"),
        teacher_net=config.net.model_dump(mode="json"),
        teacher_fraction=1.0,
        temperature=2.0,
    )
    student = make_config(net={"widths": [16, 16]})
    weights = run_loop(student, digits, tmp_path / "student", lesson)
    net = build_net(student, digits.task)
    net.load_state_dict(weights)
    with torch.no_grad():
        answers_N = (
            net.eval()(torch.from_numpy(np.array(inputs["image"][:500]))).argmax(dim=1).numpy()
        )
    assert np.mean(answers_N == (targets_N[:500] + 1) % 10) > 0.6


def test_training_starts_from_given_weights(digits, config, tmp_path):
    weights = run_loop(config, digits, tmp_path / "first", DistillationConfig())
    (tmp_path / "start").mkdir()
    save_file(weights, tmp_path / "start/weights.safetensors")
    still = config.model_copy(
        update={"optim": config.optim.model_copy(update={"name": "sgd", "epochs": 1, "lr": 1e-9})}
    )
    again = run_loop(
        still, digits, tmp_path / "again", DistillationConfig(start=str(tmp_path / "start"))
    )
    for name, value in weights.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(again[name], value, rtol=0, atol=1e-5)


def test_fake_quantization_rounds_as_int8_does(rng):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8))
    x = rng.normal(size=(5, 16)).astype(np.float32)
    weight, bias = layer[0].weight.detach().numpy().copy(), layer[0].bias.detach().numpy()
    names = list(layer.state_dict())
    fake_quant.install_fake_quant(layer)
    assert list(layer.state_dict()) == names
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    rounded_x = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    expected = rounded_x @ rounded(weight, 0, steps=64).T + bias
    result = layer(torch.from_numpy(x))
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    result.sum().backward()
    assert layer[0].weight.grad.abs().sum() > 0


# The torch engine, and whole bundles


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_the_torch_engine_matches_the_net(net, digits, tmp_path, precision, tolerance):
    net = ConvNet((8, 8, 1), 10, [16, 32], whiten=True)
    inputs, _ = digits.open("test")
    pixels = {"image": np.array(inputs["image"][:32])}
    net.fit_inputs(torch.from_numpy(pixels["image"]))
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(pixels["image"])).numpy()
    path = torch_engine.save_net(
        net.folded(), Net(widths=[16, 32]), digits.task, precision, tmp_path / "t"
    )
    loaded = torch_engine.TorchEngine.load(path, num_threads=1)
    result = loaded.run(pixels)["logits"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=tolerance * np.abs(expected).max())
    assert loaded.describe()["threads"] == 1
    if precision == "bf16":
        whole = sum(value.nbytes for value in net.folded().state_dict().values())
        assert (tmp_path / "t/weights.safetensors").stat().st_size < 0.6 * whole


def test_a_net_that_cannot_be_exported_is_run_by_torch(digits, tmp_path, capsys):
    config = make_config(
        net=f"{__name__}:Eigenvalues",
        compress={"variants": ["int8_static", "bf16"], "measure_seconds": 0.01},
    )
    torch.manual_seed(0)
    made = compress(
        Eigenvalues(), config, digits, BundleWriter(tmp_path / "b"), str(tmp_path / "runs")
    )
    assert made.variants["fp32"].engine.startswith("torch")
    assert "aten._linalg_eigh" in made.variants["fp32"].recipe["not_exported"]
    assert "aten._linalg_eigh" in made.skipped["int8_static"]
    assert (
        "cannot be exported: ONNX does not support operator aten._linalg_eigh"
        in capsys.readouterr().err
    )


def test_gpu_variants_are_skipped_without_a_gpu(digits, config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net = build_net(config, digits.task)
    compress_options = {"variants": ["fp8"], "measure_seconds": 0.01}
    values = make_config(compress=compress_options)
    made = compress(net, values, digits, BundleWriter(tmp_path / "b"), str(tmp_path / "runs"))
    assert list(made.variants) == ["fp32"]
    assert "GPU" in made.skipped["fp8"]


def test_calibration_records_include_every_class(digits, config, tmp_path):
    few = make_config(compress={"calibration_records": 10})
    builder = VariantBuilder(
        build_net(config, digits.task),
        few,
        digits,
        BundleWriter(tmp_path),
        tmp_path,
        "",
        lambda *_: True,
    )
    inputs, targets_N = digits.open("train")
    classes = {
        int(targets_N[np.flatnonzero((inputs["image"] == image).all(axis=(1, 2, 3)))[0]])
        for image in builder.calibration["image"]
    }
    assert classes == set(range(10))
    assert len(builder.trial["image"]) == TRIAL_RECORDS


def test_a_full_disk_while_writing_variants_is_reported(digits, config, tmp_path, monkeypatch):
    from cluster.errors import CommandFailed

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(RECIPES, "int8_weights", full)
    values = make_config(compress={"variants": ["int8_weights"], "measure_seconds": 0.01})
    net = build_net(config, digits.task)
    with pytest.raises(CommandFailed, match="cannot be written: No space left"):
        compress(net, values, digits, BundleWriter(tmp_path / "b"), str(tmp_path / "runs"))


def test_a_failed_variant_does_not_stop_the_others(digits, config, tmp_path, monkeypatch):
    def broken(*_):
        raise AssertionError("scale issue")

    monkeypatch.setitem(RECIPES, "int8_weights", broken)
    values = make_config(
        compress={"variants": ["int8_weights", "int8_dynamic"], "measure_seconds": 0.01}
    )
    net = build_net(config, digits.task)
    made = compress(net, values, digits, BundleWriter(tmp_path / "b"), str(tmp_path / "runs"))
    assert made.skipped == {"int8_weights": "AssertionError: scale issue"}
    assert set(made.variants) == {"fp32", "int8_dynamic"}


def test_onnx_files_that_do_not_fit_the_net_are_skipped(digits, config, tmp_path, exported):
    """The files hold a net with nine outputs, a net that returns NaN, and plain text."""
    net = build_net(config, digits.task)
    inputs, _ = digits.open("train")
    sample = {"image": np.array(inputs["image"][:8])}
    nine = ConvNet((8, 8, 1), 9, [16], whiten=False).eval()
    nothing = ConvNet((8, 8, 1), 10, [16], whiten=False).eval()
    paths = {name: tmp_path / f"{name}.onnx" for name in ("nine", "nothing", "text")}
    specs = digits.task.features.inputs
    export_onnx.to_onnx(nine.folded(), specs, sample, paths["nine"])
    export_onnx.to_onnx(nothing.folded(), specs, sample, paths["nothing"])
    model = onnx.load(paths["nothing"])
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor) * np.float32("nan")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, paths["nothing"])
    paths["text"].write_text("no ONNX")
    alone = make_config(compress={"variants": [], "measure_seconds": 0.01})
    made = compress(
        net, alone, digits, BundleWriter(tmp_path / "b"), str(tmp_path / "runs"), own=paths
    )
    assert list(made.variants) == ["fp32"]
    assert "[16, 9]}; expected logits [N, 10]" in made.skipped["nine"]
    assert "NaN" in made.skipped["nothing"]
    assert made.skipped["text"].startswith("onnxruntime: ")


def test_calibration_records_include_extreme_outputs(rng):
    """Two of 5,000 records are extreme; a random draw would miss them."""
    values = rng.normal(size=(5000, 1)).astype(np.float32)
    values[1234], values[2345] = 40, -30

    def run(inputs):
        return inputs["numbers"] @ np.array([[2.0, -1.0]])

    found = find_extremes(run, {"numbers": values}, np.arange(5000))
    assert found[:2].tolist() == [1234, 2345]
    assert len(found) == EXTREME_RECORDS
    pixels = {"image": np.zeros((9, 2, 2, 1), np.uint8)}
    assert len(find_extremes(run, pixels, np.arange(9))) == 0


class Reached(Exception):
    """Training would begin."""


def test_a_finetuning_run_is_reused_for_equal_options_only(digits, tmp_path, monkeypatch):
    """Whatever changes the trained weights is part of the run's name."""
    started = []

    def train(config, run, *arguments, **options):
        started.append(run.url)
        raise Reached

    monkeypatch.setattr(finetune.launcher, "train", train)
    weights = {"weight": torch.ones(2)}

    def run_of(weights=weights, epochs=3, **changes):
        config = make_config(**changes)
        tuner = finetune.FineTuner(config, digits, weights, str(tmp_path))
        with pytest.raises(Reached):
            tuner.distil(config.net, epochs)
        return started[-1]

    first = run_of()
    assert run_of() == first
    others = [
        run_of(epochs=4),
        run_of(weights={"weight": torch.zeros(2)}),
        run_of(workers={"num": 2, "micro_batches": 4}),
        run_of(net={"widths": [8, 8]}),
        run_of(compress={"distill": {"temperature": 7.0}}),
    ]
    assert len({first, *others}) == len(others) + 1
