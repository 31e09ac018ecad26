"""Networks of texts in ONNX: any length, and the same outputs as torch, alone or padded."""

import numpy as np
import pytest
import torch

from train import nets
from train.bundle import Predictor
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.recipes import export_onnx
from train.config import Net
from train.tasks import ClassTarget, Features, Task, Texts

MAX_TOKENS = 40


@pytest.fixture(scope="module", params=["transformer", "bag_of_words"])
def text_net(request, tmp_path_factory):
    """Return a network for texts, its task, and the engine of its ONNX file."""
    torch.manual_seed(0)
    words = [f"word{number % 60}" for number in range(240)]
    texts = Texts(("t",), max_tokens=MAX_TOKENS).fit({"t": [" ".join(words), "word1 word2"]})
    task = Task(Features((texts,)), ClassTarget("y").fit(["a", "b"]))
    net = nets.folded_net(nets.create_net(Net(text=request.param, text_width=16), task)).eval()
    path = tmp_path_factory.mktemp("texts") / "net.onnx"
    sample = {"tokens": np.array([[1, 2, 3], [4, 5, 0]], np.int32)}
    export_onnx.to_onnx(net, task.features.inputs, sample, path)
    return net, task, OnnxRuntimeEngine.load(path, num_threads=1)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 17, MAX_TOKENS])
def test_an_exported_net_accepts_any_length(text_net, rng, count, length):
    net, task, engine = text_net
    tokens = rng.integers(0, task.features.encoders[0].size, (count, length)).astype(np.int32)
    expected = net(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(engine.run({"tokens": tokens})["logits"], expected, atol=1e-5)


def test_outputs_do_not_depend_on_companions_or_padding(text_net, rng):
    _, task, engine = text_net
    lengths = [0, 1, 5, 30]
    rows = [rng.integers(1, task.features.encoders[0].size, length) for length in lengths]
    batch = np.zeros((len(rows), MAX_TOKENS), np.int32)
    for row, tokens in zip(batch, rows, strict=True):
        row[: len(tokens)] = tokens
    together = engine.run({"tokens": batch})["logits"]
    for row, length in enumerate(lengths):
        alone = engine.run({"tokens": batch[row : row + 1, : max(length, 1)]})["logits"]
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


class Recording:
    """An engine that notes the shapes of its batches."""

    def __init__(self, engine):
        self.engine, self.shapes = engine, []

    def run(self, inputs):
        self.shapes.append(inputs["tokens"].shape)
        return self.engine.run(inputs)


def test_many_records_are_run_in_order_of_length(text_net, rng):
    _, task, engine = text_net
    texts = [" ".join(["word1"] * length) for length in rng.integers(0, 30, 600)]
    recording = Recording(engine)
    predictor = Predictor(None, task, "fp32", recording)
    found = predictor.predict([{"t": text} for text in texts])
    assert [count for count, _ in recording.shapes] == [256, 256, 88]
    lengths = [length for _, length in recording.shapes]
    assert lengths == sorted(lengths)
    assert lengths[0] < 15
    for row in range(0, 600, 37):
        alone = predictor.predict([{"t": texts[row]}])
        np.testing.assert_allclose(
            alone["probabilities"][0], found["probabilities"][row], atol=1e-6
        )
        assert alone["label"][0] == found["label"][row]
    assert len(predictor.predict([])["label"]) == 0
