"""Networks of texts in ONNX: any length, and the same outputs as torch, alone or padded."""

import numpy as np
import pytest
import torch

from train import nets
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
