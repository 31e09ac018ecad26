"""Runs from a pretrained encoder: frozen, adapted or trained, and served without its library."""

import base64
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

pytest.importorskip("transformers", reason="halyard[text] is not installed")

from cluster.errors import UserError
from tests.server import REPOSITORY
from tests.train.nets.pretrained_checkpoints import (
    POSITIONS,
    save_checkpoint,
    save_image_checkpoint,
)
from train import fit
from train.bundle import Predictor
from train.bundle.bundle import WEIGHTS
from train.compress.recipes.finetune import FineTuner
from train.config import LAST, Net, Stop, validate_config
from train.data import dataset
from train.data.schema.inference import complete_config
from train.nets.pretrained.backbones import read_weights
from train.nets.pretrained.hub import find_checkpoint
from train.nets.pretrained.text import PretrainedText
from train.pretrained.backbone import attach_backbone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A file of 240 reviews, whose label is the word good or bad among others."""
    draws = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "label"])
        for number in range(240):
            words = draws.choice(list("abcdefgh"), draws.integers(1, 12)).tolist()
            words.insert(int(draws.integers(len(words))), ("good", "bad")[number % 2])
            writer.writerow([" ".join(words), ("yes", "no")[number % 2]])
    return path


def options(checkpoint, reviews, folder, **net):
    return validate_config(
        {
            "name": "reviews",
            "data": {"train": str(reviews)},
            "target": "label",
            "features": {"review": "text"},
            "net": {"pretrained": str(checkpoint), **net},
            "storage": {"path": str(folder)},
            "registry": {"enabled": False},
            "compress": {"variants": ["int8_static"], "measure_seconds": 0.2},
        }
    )


def test_the_checkpoint_fills_in_the_options(checkpoint, reviews, tmp_path):
    config = complete_config(options(checkpoint, reviews, tmp_path)).config
    assert config.net.checkpoint["sha256"] == find_checkpoint(str(checkpoint)).digest
    assert config.net.checkpoint["licence"] == "mit"
    assert config.text.max_tokens == POSITIONS
    assert config.text.tokenizer.startswith(config.storage.root), "a copy, found without the folder"
    stored = Path(config.text.tokenizer).read_bytes()
    assert stored == (checkpoint / "tokenizer.json").read_bytes()
    assert (config.net.freeze, config.stop.folds) == ("all", 5), "few records"
    assert (config.optim.name, config.optim.lr) == ("sgd", 0.002)
    trained = complete_config(options(checkpoint, reviews, tmp_path, freeze=1)).config
    assert (trained.net.freeze, trained.stop.folds) == (1, 0)
    assert trained.optim.name == "adamw"


@pytest.mark.parametrize("columns", [{"review": "text"}, {"review": "text", "n": "number"}])
def test_the_student_of_an_encoder_is_trained_as_a_new_net(
    checkpoint, reviews, tmp_path, monkeypatch, columns
):
    """The options for a linear layer on the vectors do not suit it."""
    rows = list(csv.reader(reviews.open(newline="")))
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*row, number or "n"] for number, row in enumerate(rows)])
    given = options(checkpoint, path, tmp_path).model_dump(mode="json", exclude_unset=True)
    completed = complete_config(validate_config({**given, "features": columns}))
    config = completed.config
    assert config.optim.name == ("sgd" if len(columns) == 1 else "adamw")
    started = []

    def train(config, run, *arguments, **options):
        started.append(config)
        raise InterruptedError

    monkeypatch.setattr("train.compress.recipes.finetune.launcher.train", train)
    data = dataset.prepare_dataset(config, config.storage.root)
    weights = {"weight": torch.ones(2)}
    with pytest.raises(InterruptedError):
        FineTuner(config, data, weights, config.storage.root).distil(Net(), None)
    (student,) = started
    scratch = complete_config(validate_config({**given, "features": columns, "net": {}})).config
    assert student.optim == scratch.optim
    assert (student.stop, student.checkpoint.metric) == (Stop(), LAST)


def test_more_tokens_than_positions_are_refused(checkpoint, reviews, tmp_path):
    given = options(checkpoint, reviews, tmp_path).model_dump(mode="json", exclude_unset=True)
    config = validate_config({**given, "text": {"max_tokens": POSITIONS + 1}})
    with pytest.raises(UserError, match=f"give at most {POSITIONS}"):
        complete_config(config)


def test_vectors_are_stored_once_in_the_order_of_the_records(checkpoint, reviews, tmp_path):
    config = complete_config(options(checkpoint, reviews, tmp_path)).config
    plain = dataset.prepare_dataset(config, config.storage.root)
    data = attach_backbone(config, plain)
    assert attach_backbone(config, plain) == data
    encoder = PretrainedText(config.net.checkpoint["architecture"], "mean", "all").eval()
    encoder.backbone.load_state_dict(read_weights(find_checkpoint(str(checkpoint))))
    for split in ("train", "valid", "test"):
        tokens, vectors = (each.open(split)[0]["tokens"] for each in (data, data.embedded()))
        for row in (0, len(tokens) // 2, len(tokens) - 1):
            with torch.no_grad():
                expected = encoder.embed(torch.from_numpy(tokens[row : row + 1]))
            np.testing.assert_allclose(vectors[row], expected[0], atol=1e-5)


def test_changed_weights_are_refused(checkpoint, reviews, tmp_path):
    config = complete_config(options(checkpoint, reviews, tmp_path)).config
    known = {**config.net.checkpoint, "sha256": "0" * 64}
    config = config.model_copy(update={"net": config.net.model_copy(update={"checkpoint": known})})
    data = dataset.prepare_dataset(config, config.storage.root)
    with pytest.raises(UserError, match="weights have changed"):
        attach_backbone(config, data)


def served_without(bundle, records, folder, *missing):
    """The probabilities of a bundle in a process that cannot import some packages."""
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
for name in {missing!r}:
    sys.modules[name] = None
from train.bundle import Bundle, Predictor
bundle = Bundle.load({str(bundle.path)!r})
print(Predictor.load(bundle, "fp32").predict({records!r})["probabilities"].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("net", [{"freeze": "all"}, {"freeze": "none"}, {"lora": {"rank": 4}}])
def test_a_run_ends_with_a_bundle_without_the_checkpoint(
    checkpoint, reviews, tmp_path, net, ray_session
):
    frozen = net.get("freeze") == "all"
    rates = {"optim": {"epochs": 40} if frozen else {"backbone_lr": 0.003, "epochs": 12}}
    if "lora" in net:
        rates["optim"]["backbone_lr"] = 0.01
    given = options(checkpoint, reviews, tmp_path, **net)
    given = validate_config(given.model_dump(mode="json", exclude_unset=True) | rates)
    bundle = fit(given)
    found = safetensors.torch.load_file(bundle.path / WEIGHTS)
    start = read_weights(find_checkpoint(str(checkpoint)))
    if "lora" in net:
        assert any("lora_B" in name for name in found)
    else:
        same = [bool((found[f"encoders.0.backbone.{name}"] == start[name]).all()) for name in start]
        assert all(same) if frozen else not any(same)
    # The random vectors of a frozen encoder show the label less well.
    assert bundle.manifest.metrics["test_accuracy"] > (0.65 if frozen else 0.9)
    assert bundle.manifest.variants["int8_static"].verdict != "failed"
    card = (bundle.path / "report/card.html").read_text()
    assert "licence of the encoder" in card
    records = [{"review": "a good film"}]
    expected = Predictor.load(bundle, "fp32").predict(records)["probabilities"]
    served = served_without(bundle, records, tmp_path, "torch", "transformers", "peft")
    np.testing.assert_allclose(served, expected, atol=1e-6)
    if net == {"freeze": "none"}:  # a run from this bundle has its encoder, not the checkpoint's
        more = given.model_dump(mode="json", exclude_unset=True)
        more |= {"init": bundle.location, "optim": {"epochs": 1}, "net": {"freeze": "all"}}
        again = safetensors.torch.load_file(fit(validate_config(more)).path / WEIGHTS)
        for name in start:
            torch.testing.assert_close(
                again[f"encoders.0.backbone.{name}"], found[f"encoders.0.backbone.{name}"]
            )
        assert not torch.equal(again["head.weight"], found["head.weight"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 120 noisy pictures, whose class is the colour of a square."""
    draws = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for number in range(120):
        pixels = draws.integers(0, 200, (48, 48, 3), dtype=np.uint8)
        row, column = draws.integers(0, 28, 2)
        pixels[row : row + 20, column : column + 20, number % 2] = 255
        path = folder / ("red", "green")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["vit", "test_resnet"])
def test_images_are_trained_on_vectors_of_their_encoder(kind, photos, tmp_path, ray_session):
    folder = save_image_checkpoint(tmp_path / "checkpoint", kind)
    config = validate_config(
        {
            "name": "photos",
            "data": {"train": str(photos)},
            "target": "label",
            "net": {"pretrained": str(folder)},
            "optim": {"epochs": 40},
            "storage": {"path": str(tmp_path / "runs")},
            "registry": {"enabled": False},
            "compress": {"variants": ["int8_static"], "measure_seconds": 0.2},
        }
    )
    completed = complete_config(config).config
    assert completed.features["image"].size == tuple(find_checkpoint(str(folder)).image["size"])
    assert (completed.net.freeze, completed.stop.folds) == ("all", 5)
    bundle = fit(config)
    assert bundle.manifest.metrics["test_accuracy"] > 0.7
    assert bundle.manifest.variants["int8_static"].verdict != "failed"
    content = next(photos.glob("red/*.png")).read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    records = [{"image": uri}]
    expected = Predictor.load(bundle, "fp32").predict(records)["probabilities"]
    served = served_without(bundle, records, tmp_path, "torch", "transformers", "timm")
    np.testing.assert_allclose(served, expected, atol=1e-6)


def test_augmented_images_have_no_vectors_in_advance(photos, tmp_path):
    folder = save_image_checkpoint(tmp_path / "checkpoint", "test_resnet")
    given = {
        "data": {"train": str(photos)},
        "target": "label",
        "net": {"pretrained": str(folder)},
        "storage": {"path": str(tmp_path / "runs")},
    }
    for augment in ({}, {"flip": True}):
        config = complete_config(validate_config(given | {"augment": augment})).config
        data = attach_backbone(config, dataset.prepare_dataset(config, config.storage.root))
        assert ("vectors" in data.summary["backbone"]) == (not augment)


def test_an_encoder_of_another_kind_of_columns_is_refused(reviews, tmp_path):
    folder = save_image_checkpoint(tmp_path / "checkpoint", "test_resnet")
    with pytest.raises(UserError, match="encoder of the kind image, and no feature is of this"):
        complete_config(options(folder, reviews, tmp_path))
