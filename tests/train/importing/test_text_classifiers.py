"""Text classifiers of transformers predict in ONNX Runtime as they do in transformers."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from cluster.errors import UserError
from tests.train.importing.test_importer import imported
from tests.train.nets.pretrained_checkpoints import ARCHITECTURES, POSITIONS, save_checkpoint
from train.bundle import Predictor

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs halyard[text]")

WORDS = ["good", "bad", "film", "a", "b", "c", "unknown"]


def save_classifier(folder, kind="bert", labels=("cold", "mild", "warm"), **changes):
    """Write a text classifier with random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    save_checkpoint(folder, kind)
    if labels:
        changes["id2label"] = dict(enumerate(labels))
        changes["label2id"] = {name: number for number, name in enumerate(labels)}
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **changes})
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    for param in model.parameters():
        if param.ndim >= 2:
            torch.nn.init.normal_(param, std=0.3)
    model.save_pretrained(folder)
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS}
    facts |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return model.eval()


def sample_of(labels, count=80):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]
    return pd.DataFrame({"text": texts, "mood": rng.choice(labels, count)})


@pytest.mark.parametrize(
    "kind",
    ["bert", *(pytest.param(k, marks=pytest.mark.slow) for k in ARCHITECTURES if k != "bert")],
)
def test_a_text_classifier(kind, tmp_path):
    from transformers import AutoTokenizer

    labels = ("cold", "mild", "warm")
    model = save_classifier(tmp_path / "model", kind, labels)
    sample = sample_of(labels)
    bundle = imported(tmp_path / "model", sample, "mood", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    given = tokenizer(
        sample["text"].tolist(),
        padding=True,
        truncation=True,
        max_length=POSITIONS,
        return_tensors="pt",
    )
    with torch.inference_mode():
        wanted = torch.softmax(model(**given).logits, dim=1).numpy()
    found = Predictor.load(bundle, "fp32").predict(sample[["text"]].to_dict("records"))
    np.testing.assert_allclose(found["probabilities"], wanted, rtol=0, atol=1e-4)
    assert found["label"].tolist() == [labels[index] for index in wanted.argmax(axis=1)]
    assert bundle.manifest.imported.format == "transformers"
    assert "fp32" in bundle.manifest.variants


def test_the_bundle_is_served_without_transformers(tmp_path):
    save_classifier(tmp_path / "model")
    bundle = imported(tmp_path / "model", sample_of(("cold", "mild", "warm")), "mood", tmp_path)
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from train.bundle import Bundle, Predictor\n"
        f"bundle = Bundle.load({bundle.location!r})\n"
        "print(Predictor.load(bundle).predict([{'text': 'a good film'}])['label'][0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() in ("cold", "mild", "warm")


@pytest.mark.slow
def test_a_regression_of_texts(tmp_path):
    from transformers import AutoTokenizer

    model = save_classifier(tmp_path / "model", labels=(), num_labels=1)
    sample = sample_of([0.5]).assign(mood=np.random.default_rng(1).normal(3, 1, 80))
    bundle = imported(tmp_path / "model", sample, "mood", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    given = tokenizer(sample["text"].tolist(), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = model(**given).logits[:, 0].numpy()
    found = Predictor.load(bundle, "fp32").predict(sample[["text"]].to_dict("records"))
    np.testing.assert_allclose(found["value"], wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_classes_without_names_are_those_of_the_sample(tmp_path, capsys):
    save_classifier(tmp_path / "model", labels=(), num_labels=2)
    bundle = imported(tmp_path / "model", sample_of(["no", "yes"]), "mood", tmp_path)
    assert bundle.task.target.classes == ("no", "yes")
    assert "in the order of their names, 0 is 'no', 1 is 'yes'" in capsys.readouterr().err


def test_two_columns_and_pickled_weights_are_refused(tmp_path):
    save_classifier(tmp_path / "model")
    labels = ("cold", "mild", "warm")
    sample = sample_of(labels).assign(title="a")
    with pytest.raises(UserError, match="takes 1 columns, and the sample has 2 besides"):
        imported(tmp_path / "model", sample, "mood", tmp_path)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are a pickle"):
        imported(tmp_path / "model", sample_of(labels), "mood", tmp_path)
