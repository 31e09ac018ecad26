"""Runs from a pretrained text encoder: frozen or trained, and served without its library."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip("transformers", reason="halyard[text] is not installed")

from cluster.errors import UserError
from tests.server import REPOSITORY
from tests.train.nets.pretrained_checkpoints import POSITIONS, save_checkpoint
from train import fit
from train.bundle import Predictor
from train.bundle.bundle import WEIGHTS
from train.config import validate_config
from train.data import dataset
from train.data.schema.inference import complete_config
from train.nets.pretrained.checkpoints import find_checkpoint
from train.nets.pretrained.text import PretrainedText, read_weights
from train.pretrained import attach_backbone


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
            "compress": {"variants": ["int8_static", "int8_dynamic"], "measure_seconds": 0.2},
        }
    )


def test_the_checkpoint_fills_in_the_options(checkpoint, reviews, tmp_path):
    config = complete_config(options(checkpoint, reviews, tmp_path)).config
    assert config.net.checkpoint["sha256"] == find_checkpoint(str(checkpoint)).digest
    assert config.net.checkpoint["licence"] == "mit"
    assert config.text.max_tokens == POSITIONS
    assert config.text.tokenizer == str(checkpoint / "tokenizer.json")
    assert (config.net.freeze, config.stop.folds) == ("all", 5), "few records"
    trained = complete_config(options(checkpoint, reviews, tmp_path, freeze=1)).config
    assert (trained.net.freeze, trained.stop.folds) == (1, 0)


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


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("freeze", ["all", "none"])
def test_a_run_ends_with_a_bundle_without_the_checkpoint(
    checkpoint, reviews, tmp_path, freeze, ray_session
):
    rates = {} if freeze == "all" else {"optim": {"backbone_lr": 0.003, "epochs": 12}}
    given = options(checkpoint, reviews, tmp_path, freeze=freeze)
    given = validate_config(given.model_dump(mode="json", exclude_unset=True) | rates)
    bundle = fit(given)
    found = safetensors.torch.load_file(bundle.path / WEIGHTS)
    start = read_weights(find_checkpoint(str(checkpoint)))
    same = [bool((found[f"encoders.0.backbone.{name}"] == start[name]).all()) for name in start]
    assert all(same) if freeze == "all" else not any(same)
    # The random vectors of a frozen encoder show the label less well.
    assert bundle.manifest.metrics["test_accuracy"] > {"all": 0.65, "none": 0.9}[freeze]
    assert bundle.manifest.variants["int8_static"].verdict != "failed"
    card = (bundle.path / "report/card.html").read_text()
    assert "licence of the encoder" in card
    expected = Predictor.load(bundle, "fp32").predict([{"review": "a good film"}])
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["torch"] = sys.modules["transformers"] = None
from train.bundle import Bundle, Predictor
bundle = Bundle.load({str(bundle.path)!r})
found = Predictor.load(bundle, "fp32").predict([{{"review": "a good film"}}])
print(found["probabilities"].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), expected["probabilities"], atol=1e-6)
    if freeze == "none":  # a run from this bundle has its encoder, not that of the checkpoint
        more = given.model_dump(mode="json", exclude_unset=True)
        more |= {"init": bundle.location, "optim": {"epochs": 1}, "net": {"freeze": "all"}}
        again = safetensors.torch.load_file(fit(validate_config(more)).path / WEIGHTS)
        for name in start:
            torch.testing.assert_close(
                again[f"encoders.0.backbone.{name}"], found[f"encoders.0.backbone.{name}"]
            )
        assert not torch.equal(again["head.weight"], found["head.weight"])
