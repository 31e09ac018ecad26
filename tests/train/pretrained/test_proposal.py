"""The choice between a pretrained encoder and a net trained from scratch."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="halyard[text] is not installed")

from cluster.errors import UserError
from tests.train.nets.pretrained_checkpoints import save_checkpoint, save_image_checkpoint
from train.config import validate_config
from train.data.schema.inference import complete_config
from train.loop.run_directory import Run
from train.nets.pretrained.backbones import read_weights
from train.nets.pretrained.hub import find_checkpoint, local_checkpoint
from train.nets.pretrained.text import PretrainedText
from train.pretrained import proposal
from train.pretrained.proposal import SCRATCH, explain_choice, propose_net
from train.tasks import Texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def write(path, texts, labels):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return path


@pytest.fixture(scope="module")
def texts():
    draws = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return [" ".join(draws.choice(letters, draws.integers(3, 20))) for _ in range(200)]


@pytest.fixture(scope="module")
def by_word(texts, tmp_path_factory):
    """A file whose label is whether a text has the letter a."""
    labels = ["yes" if "a" in text.split() else "no" for text in texts]
    return write(tmp_path_factory.mktemp("word") / "train.csv", texts, labels)


@pytest.fixture(scope="module")
def by_vector(texts, checkpoint, tmp_path_factory):
    """A file whose label is a linear function of the encoder's vector."""
    found = find_checkpoint(str(checkpoint))
    encoder = PretrainedText(found.architecture, "mean", "all").eval()
    encoder.load_backbone(read_weights(found))
    tokens = Texts(("t",), 40, tokenizer=found.tokenizer.read_text()).fit({"t": texts})
    with torch.inference_mode():
        vectors = encoder.embed(torch.from_numpy(tokens.encode({"t": texts})["tokens"])).numpy()
    first = np.linalg.svd(vectors - vectors.mean(axis=0))[2][0]
    values = vectors @ first
    labels = np.where(values > np.median(values), "yes", "no")
    return write(tmp_path_factory.mktemp("vector") / "train.csv", texts, labels)


def config_of(path, folder, **options):
    return validate_config(
        {
            "data": {"train": str(path)},
            "target": "label",
            "features": {"text": "text"},
            "storage": {"path": str(folder)},
            "optim": {"epochs": 40},
            **options,
        }
    )


@pytest.fixture
def configured(checkpoint, monkeypatch):
    monkeypatch.setenv("HALYARD_PRETRAINED", str(checkpoint))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("kind", "wins"), [("by_word", False), ("by_vector", True)])
def test_the_net_with_the_lower_loss_is_chosen(
    kind, wins, checkpoint, configured, tmp_path, request, capsys, ray_session
):
    config = config_of(request.getfixturevalue(kind), tmp_path)
    found = propose_net(config, complete_config(config))
    assert found.config.net.pretrained == (str(checkpoint) if wins else None)
    told = capsys.readouterr().err
    assert "comparing the pretrained encoder" in told
    assert told.count("used as") == 1, "columns are inferred once"
    assert found.choice in told
    assert all(name in found.choice for name in ("linear", "gradient-boosted", SCRATCH))
    if wins:
        assert found.config.net.freeze == "all"
        run = Run.start(str(tmp_path / "train/first"), found.config)
        again = config_of(request.getfixturevalue(kind), tmp_path, resume=run.name)
        kept = propose_net(again, complete_config(again)).config
        assert kept.net == found.config.net
        assert "comparing" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 60 noisy pictures, whose class is the brighter half."""
    draws = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for number in range(60):
        pixels = draws.integers(0, 200, (48, 48, 3), dtype=np.uint8)
        pixels[:, slice(24) if number % 2 else slice(24, 48)] += 50
        path = folder / ("right", "left")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("size", [None, [32, 32]])
def test_an_image_encoder_is_compared(size, photos, tmp_path, monkeypatch, capsys, ray_session):
    folder = save_image_checkpoint(tmp_path / "checkpoint", "test_resnet")
    monkeypatch.setenv("HALYARD_PRETRAINED", str(folder))
    feature = {"kind": "image"} | ({} if size is None else {"size": size})
    given = {"features": {"image": feature}, "optim": {"epochs": 3}}
    config = config_of(photos, tmp_path, **given)
    found = propose_net(config, complete_config(config))
    assert "over 5 folds" in capsys.readouterr().err
    losses = [float(loss) for loss in re.findall(r" (\d+\.\d{4})", found.choice)]
    assert len(losses) == 2, "no simple models of images"
    assert found.config.net.pretrained == (str(folder) if losses[0] < losses[1] else None)
    monkeypatch.setattr(proposal, "_loss", lambda config: float(config.net.pretrained is None))
    chosen = propose_net(config, complete_config(config)).config
    assert (chosen.net.pretrained, chosen.net.freeze) == (str(folder), "all")
    expected = find_checkpoint(str(folder)).image["size"] if size is None else size
    assert chosen.features["image"].size == tuple(expected)


def test_augmented_images_are_not_compared(photos, tmp_path, monkeypatch, capsys):
    """The encoder would run in every epoch of every fold."""
    folder = save_image_checkpoint(tmp_path / "checkpoint", "test_resnet")
    monkeypatch.setenv("HALYARD_PRETRAINED", str(folder))
    given = {"features": {"image": "image"}, "augment": {"flip": True}}
    config = config_of(photos, tmp_path, **given)
    completed = complete_config(config)
    assert propose_net(config, completed) is completed
    assert "comparing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"net": {"text": "transformer"}},
        {"net": {"pretrained": None}},
        {"stop": {"folds": 0, "metric": "valid_loss"}},
        {"stop": {"metric": "valid_accuracy"}},
    ],
)
def test_a_given_net_or_no_folds_leave_nothing_to_compare(
    options, configured, by_word, tmp_path, capsys
):
    config = config_of(by_word, tmp_path, **options)
    completed = complete_config(config)
    assert propose_net(config, completed) is completed
    assert "comparing" not in capsys.readouterr().err


def test_an_unusable_encoder_in_the_environment_is_named(monkeypatch, by_word, tmp_path):
    monkeypatch.setenv("HALYARD_PRETRAINED", str(tmp_path / "nothing"))
    config = config_of(by_word, tmp_path)
    with pytest.raises(
        UserError, match=r"HALYARD_PRETRAINED is not usable: .*not a folder"
    ) as error:
        propose_net(config, complete_config(config))
    assert "\n" not in str(error.value)


def test_an_unusable_encoder_in_the_cache_is_left_out(monkeypatch, by_word, tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    monkeypatch.setattr(proposal, "local_checkpoint", lambda kind: find_checkpoint(str(folder)))
    monkeypatch.delenv("HALYARD_PRETRAINED")
    config = config_of(by_word, tmp_path)
    completed = complete_config(config)
    assert propose_net(config, completed) is completed
    assert "is left out: net.pretrained is" in capsys.readouterr().err


def test_an_encoder_of_sentences_in_the_cache_is_found(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HALYARD_PRETRAINED", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert local_checkpoint("text") is None
    for name in ("sentences", "plain", "photos", "damaged"):
        folder = tmp_path / f"models--me--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("1" * 40)
        (folder / "blobs").mkdir()
        snapshot = folder / "snapshots" / ("1" * 40)
        if name == "photos":
            save_image_checkpoint(snapshot)
            continue
        save_checkpoint(snapshot)
        if name != "plain":
            (snapshot / "1_Pooling").mkdir()
            (snapshot / "1_Pooling/config.json").write_text(json.dumps({}))
        if name == "damaged":
            (snapshot / "tokenizer.json").unlink()
    found = local_checkpoint("text")
    assert found is not None
    assert found.name == "me/sentences"
    assert find_checkpoint(found.name).folder == found.folder
    assert local_checkpoint("image") is None
    monkeypatch.setenv("HALYARD_PRETRAINED", "")
    assert local_checkpoint("text") is None


def test_a_simple_model_that_is_best_is_named():
    losses = {"the encoder": 0.5, SCRATCH: 0.7, "a linear model": 0.6}
    assert explain_choice(losses, "the encoder").startswith("chose the encoder by")
    assert "lowest" not in explain_choice(losses, "the encoder")
    losses["a linear model"] = 0.4
    assert explain_choice(losses, "the encoder").endswith(
        "a linear model has the lowest loss of all"
    )
    losses["the encoder"] = 0.8
    assert explain_choice(losses, "the encoder").startswith(f"chose {SCRATCH} by")
