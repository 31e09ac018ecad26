"""Pretrained text encoders: the vectors of transformers, in training and in ONNX."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

pytest.importorskip("transformers", reason="halyard[text] is not installed")

from cluster.errors import UserError
from tests.train.nets.pretrained_checkpoints import (
    ARCHITECTURES,
    POSITIONS,
    WORDS,
    save_checkpoint,
)
from train import nets
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.recipes import export_onnx
from train.config import Net, Optim
from train.data.schema.defaults import suited_defaults
from train.loop.optimizers import build_optimizers
from train.nets.pretrained.backbones import read_weights
from train.nets.pretrained.encoder import LENGTH
from train.nets.pretrained.hub import find_checkpoint
from train.nets.pretrained.text import PretrainedText
from train.tasks import ClassTarget, Features, Task, Texts

TEXTS = ["good film", "", "a b c d e f g h i j", "bad", "unknown words and good film " * 4]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    return find_checkpoint(
        str(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param))
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return find_checkpoint(str(save_checkpoint(tmp_path_factory.mktemp("bert"))))


def encoder_of(checkpoint, pooling="mean", freeze="none"):
    encoder = PretrainedText(checkpoint.architecture, pooling, freeze)
    encoder.load_backbone(read_weights(checkpoint))
    return encoder.eval()


def texts_of(checkpoint):
    tokenizer = checkpoint.tokenizer.read_text()
    return Texts(("t",), checkpoint.max_tokens, tokenizer=tokenizer).fit({"t": TEXTS})


def reference(checkpoint, text):
    """The last hidden states of one text by transformers alone, float32 [L, D]."""
    from transformers import AutoModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint.tokenizer))
    model = AutoModel.from_pretrained(checkpoint.folder, attn_implementation="eager").eval()
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"][:POSITIONS]])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_vectors_are_those_of_transformers(checkpoint, pooling):
    tokens = texts_of(checkpoint).encode({"t": TEXTS})["tokens"]
    with torch.no_grad():
        together = encoder_of(checkpoint, pooling)(torch.from_numpy(tokens))
    for row, text in enumerate(TEXTS):
        states_LD = reference(checkpoint, text)
        expected = {"mean": states_LD.mean(0), "cls": states_LD[0], "last": states_LD[-1]}[pooling]
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-4)


def test_an_exported_encoder_accepts_any_length(checkpoint, tmp_path):
    task = Task(Features((texts_of(checkpoint),)), ClassTarget("y").fit(["a", "b"]))
    options = {"kind": "text", "architecture": checkpoint.architecture, "pooling": "mean"}
    net = nets.create_net(Net(pretrained="x", checkpoint=options), task)
    net.encoders[0].load_backbone(read_weights(checkpoint))
    torch.nn.init.normal_(net.head.weight, std=0.1)
    net = nets.folded_net(net)
    inputs = task.features.encode({"t": TEXTS})
    export_onnx.to_onnx(net, task.features.inputs, inputs, tmp_path / "net.onnx")
    engine = OnnxRuntimeEngine.load(tmp_path / "net.onnx", num_threads=1)
    together = engine.run(inputs)["logits"]
    for row, text in enumerate(TEXTS):
        alone = task.features.encode({"t": [text]})
        with torch.no_grad():
            expected = net(torch.from_numpy(alone["tokens"])).numpy()
        np.testing.assert_allclose(engine.run(alone)["logits"], expected, atol=1e-4)
        np.testing.assert_allclose(together[row], expected[0], atol=1e-4)


@pytest.mark.parametrize("width", [16, 1024])
def test_a_head_on_vectors_learns_as_logistic_regression(rng, bert, width):
    """With the default rate, whatever the width and the scale of the vectors."""
    centres_KD = rng.normal(size=(3, width))
    targets_N = rng.integers(3, size=120)
    noise_ND = rng.normal(size=(120, width)) * np.sqrt(width)
    vectors_ND = 7 + 100 * (centres_KD[targets_N] + noise_ND).astype(np.float32)
    encoder = encoder_of(bert, freeze="all")
    encoder.mean_D = torch.zeros(width)
    encoder.fit_inputs(torch.from_numpy(vectors_ND))
    scaled_ND = encoder(torch.from_numpy(vectors_ND))
    assert scaled_ND.square().sum(dim=1).mean() == pytest.approx(LENGTH**2, rel=1e-4)
    suited = suited_defaults({"text"}, 120, net=Net(pretrained="x"))["optim"]
    head = torch.nn.Linear(width, 3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(
        [
            {"params": [head.weight], "weight_decay": suited["weight_decay"]},
            {"params": [head.bias], "weight_decay": 0.0},
        ],
        lr=suited["lr"],
        momentum=suited["momentum"],
        nesterov=True,
    )
    for _ in range(1500):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(scaled_ND), torch.from_numpy(targets_N))
        loss.backward()
        optimizer.step()
    reference = LogisticRegression(C=1 / (120 * suited["weight_decay"]), max_iter=5000)
    expected_NK = reference.fit(scaled_ND.numpy(), targets_N).predict_proba(scaled_ND.numpy())
    found_NK = torch.softmax(head(scaled_ND), dim=1).detach().numpy()
    np.testing.assert_allclose(found_NK, expected_NK, atol=0.02)


@pytest.mark.parametrize(("freeze", "trained"), [("none", "e012"), (1, "12"), (3, ""), ("all", "")])
def test_frozen_layers_keep_their_weights(checkpoint, freeze, trained):
    encoder = encoder_of(checkpoint, freeze=freeze)
    found = set()
    for param, steps in encoder.depths():
        if param.requires_grad:
            found.add("e" if steps == 3 else str(2 - steps))
    # What follows the last layer, such as a norm, is frozen with "all" only.
    assert found - {"2"} == set(trained) - {"2"}
    assert ("2" in found) or freeze in ("all", 3)


def test_more_frozen_layers_than_there_are_is_refused(bert):
    with pytest.raises(ValueError, match="freeze is 4, and the encoder has 3 layers"):
        PretrainedText(bert.architecture, "mean", 4)


def test_rates_fall_towards_the_embeddings(bert):
    task = Task(Features((texts_of(bert),)), ClassTarget("y").fit(["a", "b"]))
    net = nets.create_net(Net(pretrained="x", checkpoint=bert.facts), task)
    config = Optim(name="adamw", lr=0.01, backbone_lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    groups = [group for each in build_optimizers(config, net) for group in each.param_groups]
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate_of) == sum(len(group["params"]) for group in groups)
    assert rate_of == {id(p): 1e-3 * 0.5**steps for p, steps in net.encoders[0].depths()} | {
        id(p): 0.01 for p in net.head.parameters()
    }
    decays = {(p.ndim >= 2, group["weight_decay"]) for group in groups for p in group["params"]}
    assert decays == {(True, 0.1), (False, 0.0)}


def test_several_columns_are_one_text_with_a_border(bert):
    tokenizer = bert.tokenizer.read_text()
    texts = Texts(("t", "u"), 10, tokenizer=tokenizer).fit({"t": ["a"], "u": ["b"]})
    tokens = texts.encode({"t": ["good film", "a", None], "u": ["bad", "", None]})["tokens"]
    named = [[WORDS[number - 1] for number in row if number] for row in tokens]
    assert named == [
        ["[CLS]", "good", "film", "[SEP]", "bad", "[SEP]"],
        ["[CLS]", "a", "[SEP]"],
        ["[CLS]", "[SEP]"],
    ]
    long = texts.encode({"t": ["a b c d e f g h i"], "u": ["k"]})["tokens"]
    assert [WORDS[number - 1] for number in long[0]][-2:] == ["h", "[SEP]"]


def test_a_checkpoint_is_described(bert, tmp_path):
    assert (bert.licence, bert.max_tokens, bert.pooling) == ("mit", POSITIONS, "mean")
    other = find_checkpoint(str(save_checkpoint(tmp_path / "other", "roberta", licence=None)))
    assert (other.licence, other.max_tokens) == (None, POSITIONS)
    (other.folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (other.folder / "1_Pooling/config.json").write_text(json.dumps(modes))
    assert find_checkpoint(str(other.folder)).pooling == "cls"


@pytest.fixture
def copied(tmp_path):
    return save_checkpoint(tmp_path / "copied")


def test_a_pickle_is_refused(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its weights are a pickle \(pytorch_model.bin\)"):
        find_checkpoint(str(copied))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", "'config.json' cannot be read: FileNotFoundError"),
        ("model.safetensors", "it has no model.safetensors"),
        ("tokenizer.json", "it has no tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(copied, file, words):
    (copied / file).unlink()
    with pytest.raises(UserError, match=words) as error:
        find_checkpoint(str(copied))
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"lack 'encoder.layer.3.*' and \d+ more") as error:
        read_weights(find_checkpoint(str(copied)))
    assert "\n" not in str(error.value)
    (copied / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(UserError, match="weights"):
        read_weights(find_checkpoint(str(copied)))


@pytest.mark.parametrize("kind", ["t5", "vit", "never-heard-of"])
def test_other_model_types_are_refused(kind):
    with pytest.raises(ValueError, match=f"the model type '{kind}'") as error:
        PretrainedText({"model_type": kind}, "mean", "none")
    assert "\n" not in str(error.value)


def test_a_hub_name_without_network_names_the_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nor in the cache .*HF_HUB_OFFLINE") as error:
        find_checkpoint("nobody/nothing")
    assert str(tmp_path / "cache") in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="which is not a folder"):
        find_checkpoint("./no/such/folder")


def test_the_file_of_a_config_cannot_name_code(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}})
    )
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    checkpoint = find_checkpoint(str(copied))
    assert "auto_map" not in checkpoint.architecture
    encoder_of(checkpoint)


def test_adapters_alone_are_trained_and_merged(checkpoint):
    tokens = torch.from_numpy(texts_of(checkpoint).encode({"t": TEXTS})["tokens"])
    adapters = {"rank": 2, "alpha": 4.0, "targets": None}
    torch.manual_seed(0)
    encoder = PretrainedText(checkpoint.architecture, "mean", "none", adapters)
    weights = read_weights(checkpoint)
    encoder.load_backbone(weights)
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokens), encoder_of(checkpoint)(tokens))
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {steps for p, steps in encoder.depths() if p.requires_grad} == {0, 1, 2}
    for param in trained.values():
        torch.nn.init.normal_(param, std=0.2)
    with torch.no_grad():
        before = encoder(tokens)
        encoder.merge_adapters()
        torch.testing.assert_close(encoder(tokens), before, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(before, encoder_of(checkpoint)(tokens), atol=0.01)
    assert encoder.backbone.state_dict().keys() == weights.keys()


def test_adapters_have_the_rank_and_the_targets_of_peft(bert):
    adapters = {"rank": 2, "alpha": 8.0, "targets": ["query"]}
    encoder = PretrainedText(bert.architecture, "mean", "none", adapters)
    names = {name for name, p in encoder.backbone.named_parameters() if p.requires_grad}
    assert names == {
        f"encoder.layer.{layer}.attention.self.query.lora_{one}.default.weight"
        for layer in range(3)
        for one in "AB"
    }
    query = encoder.backbone.encoder.layer[0].attention.self.query
    torch.nn.init.normal_(query.lora_B.default.weight)
    x_BD = torch.randn(4, 16)
    low_DD = query.lora_B.default.weight @ query.lora_A.default.weight
    torch.testing.assert_close(query(x_BD), query.base_layer(x_BD) + 4.0 * x_BD @ low_DD.T)


def test_adapters_of_unknown_layers_are_refused(bert):
    adapters = {"rank": 2, "alpha": 8.0, "targets": ["nothing"]}
    with pytest.raises(ValueError, match=r"no layer is named; the names are .*query") as error:
        PretrainedText(bert.architecture, "mean", "none", adapters)
    assert "\n" not in str(error.value)


def test_options_without_a_pretrained_encoder_are_refused():
    with pytest.raises(ValueError, match="option lora needs a pretrained encoder"):
        Net(lora={})
    with pytest.raises(ValueError, match="leave freeze out"):
        Net(pretrained="x", lora={}, freeze="all")


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: 'mit'  ", "mit"),
        ("license:\nlanguage: en", None),
        ("license:\n- mit", None),
    ],
)
def test_the_licence_is_that_of_its_own_line(copied, lines, licence):
    (copied / "README.md").write_text(f"---\nlanguage: en\n{lines}\n---\n# Tiny\n")
    assert find_checkpoint(str(copied)).licence == licence


def test_adapters_beside_the_weights_are_not_read(copied):
    (copied / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    found = read_weights(find_checkpoint(str(copied)))
    assert not any("lora" in name for name in found)
