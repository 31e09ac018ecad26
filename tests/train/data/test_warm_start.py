"""Extra training records, and runs that start from a bundle."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import safetensors.torch

from cluster.errors import UserError
from tests.conftest import make_config
from tests.train.tasks.test_tasks import image_bytes
from train import cli, training
from train.bundle import Bundle, registry
from train.bundle.bundle import WEIGHTS
from train.config import validate_config
from train.data import dataset
from train.data.preprocess import record_digests
from train.data.schema import inference
from train.loop.net_setup import build_net


@pytest.fixture
def extra(write_parquet, rng):
    """The URL of 40 different labelled images of random pixels."""
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    rows = [{"image": image_bytes(image), "label": n % 10} for n, image in enumerate(images)]
    return write_parquet(rows, "extra.parquet")


def prepared(config, extra, fitted=None, **data):
    changes = {"train": "sklearn:digits", "extra": extra, **data}
    changed = make_config(data=changes, storage={"path": config.storage.path})
    return dataset.prepare_dataset(changed, config.storage.path, fitted)


def copies(data, digits):
    """Count each extra record in the training samples; the other samples are the digits."""
    inputs, targets_N = data.open("train")
    own, own_targets_N = digits.open("train")
    count = len(own_targets_N)
    np.testing.assert_array_equal(inputs["image"][:count], own["image"])
    np.testing.assert_array_equal(targets_N[:count], own_targets_N)
    return Counter(record_digests({"image": inputs["image"][count:]}).tolist())


def test_extra_records_change_neither_held_out_splits_nor_fits(config, digits, extra):
    data = prepared(config, extra)
    assert data.task == digits.task
    for name in ("valid", "test"):
        assert data.summary["splits"][name] == digits.summary["splits"][name]
        inputs, targets_N = data.open(name)
        own, own_targets_N = digits.open(name)
        np.testing.assert_array_equal(inputs["image"], own["image"])
        np.testing.assert_array_equal(targets_N, own_targets_N)
    assert sorted(copies(data, digits).values()) == [1] * 40
    assert data.summary["splits"]["train"]["extra"] == extra
    assert data.summary["digest"] != digits.summary["digest"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8])
def test_extra_records_are_repeated_or_drawn_to_their_fraction(config, digits, extra, share):
    data = prepared(config, extra, extra_fraction=share)
    found = copies(data, digits)
    total = data.summary["splits"]["train"]["num_records"]
    assert found.total() / total == pytest.approx(share, abs=1 / total)
    # The counts differ by at most one.
    often = [*found.values(), *[0] * (40 - len(found))]
    assert max(often) - min(often) <= 1


def test_the_split_seed_selects_the_extra_records(config, digits, extra):
    drawn = [
        copies(prepared(config, extra, extra_fraction=0.01, split_seed=seed), own)
        for seed, own in ((0, digits), (1, prepared(config, None, split_seed=1)))
    ]
    assert drawn[0].keys() != drawn[1].keys()


def test_extra_fraction_without_extra_records_is_refused():
    with pytest.raises(UserError, match=r"extra_fraction is for data\.extra"):
        make_config(data={"train": "sklearn:digits", "extra_fraction": 0.5})


def test_extra_records_may_lack_the_split_column(write_parquet, config, rng):
    images = [image_bytes(image) for image in rng.integers(0, 256, (40, 8, 8), np.uint8)]
    rows = [{"image": image, "label": n % 2, "who": n // 2} for n, image in enumerate(images)]
    url = write_parquet(rows)
    extra = write_parquet([{"image": image, "label": 0} for image in images[:3]], "extra.parquet")
    data = prepared(config, extra, train=url, split_key="who")
    counts = {name: split["num_records"] for name, split in data.summary["splits"].items()}
    assert sum(counts.values()) == 43 - held_out_extra(data)


def held_out_extra(data):
    """Return the number of extra records that the report lists as held out."""
    words = [note for note in data.summary["report"]["notes"] if "are held out" in note]
    return int(words[0].split()[1]) if words else 0


def test_extra_records_that_are_held_out_are_not_trained_on(config, digits):
    """The extra records are the training source; its valid and test records stay held out."""
    held = sum(digits.summary["splits"][name]["num_records"] for name in ("valid", "test"))
    data = prepared(config, "sklearn:digits")
    assert held_out_extra(data) == held
    own = digits.summary["splits"]["train"]["num_records"]
    assert data.summary["splits"]["train"]["num_records"] == 2 * own
    trained = set(record_digests(data.open("train")[0]).tolist())
    for name in ("valid", "test"):
        assert not trained & set(record_digests(data.open(name)[0]).tolist())


def test_a_fitted_task_is_used_unchanged(config, digits, write_parquet, rng):
    """The data has only two classes, so a new fit would find only two."""
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    rows = [{"image": image_bytes(image), "label": str(n % 2)} for n, image in enumerate(images)]
    url = write_parquet(rows)
    anew = prepared(config, None, train=url)
    assert len(anew.task.target.classes) == 2
    data = prepared(config, None, digits.task, train=url)
    assert data.task.to_dict() == digits.task.to_dict()
    assert data.url != anew.url
    rows[7]["label"] = "ten"
    with pytest.raises(UserError, match=r"row 7: .*'ten'"):
        prepared(config, None, digits.task, train=write_parquet(rows, "other.parquet"))


def begun(bundle, storage_path, **options):
    """Return the config of a run that starts from a bundle, before inference completes it."""
    changes = {"storage": {"path": str(storage_path)}, **options}
    given = {"name": "digits", "data": {"train": "sklearn:digits"}, "init": str(bundle.path)}
    return validate_config({**given, **changes})


def test_a_warm_start_uses_the_task_and_net_of_its_bundle(bundle, trained, storage_path):
    completed = inference.complete_config(
        begun(bundle, storage_path, init="models:/digits@production")
    )
    config = completed.config
    own = inference.complete_config(begun(bundle, storage_path)).config
    # Other tests may have promoted other versions.
    location, version = registry.resolve_model("models:/digits@production", str(storage_path))
    assert config.init == f"models:/digits/{version}"
    assert own.init == str(bundle.path)
    for each, began_from in ((config, Bundle.load(location)), (own, bundle)):
        assert each.net.model_dump(mode="json") == began_from.manifest.config["net"]
        assert (each.task_type, list(each.features)) == ("classification", ["image"])
    assert completed.init_bundle.location == location
    assert inference.complete_config(config).config == config
    wanted = build_net(own, bundle.task).state_dict()
    assert wanted.keys() == safetensors.torch.load_file(bundle.path / WEIGHTS).keys()


def test_the_initial_bundle_is_loaded_once(bundle, storage_path, monkeypatch):
    loaded = []
    load = Bundle.load.__func__

    def counted(cls, location):
        loaded.append(location)
        return load(cls, location)

    monkeypatch.setattr(Bundle, "load", classmethod(counted))
    completed = inference.complete_config(begun(bundle, storage_path))
    training.check_weights(completed.config, completed.init_bundle)
    training.build_lineage(completed.config.init, completed.init_bundle)
    assert loaded == [str(bundle.path)]


def check(config):
    completed = inference.complete_config(config)
    training.check_weights(completed.config, completed.init_bundle)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"net": {"widths": [8, 16]}},
            ["do not fit", "8x", "32x", "leave the options of net"],
        ),
        ({"target": "digit"}, ["option 'target' is 'label', not 'digit'"]),
        ({"features": {"scan": "image"}}, ["option 'features' is image, not scan"]),
        ({"init": "models:/nothing/1"}, ["models:/nothing/1", "train/main.py"]),
        ({"init": "nowhere"}, ["init is 'nowhere'", "is not a complete bundle"]),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_in_one_line(bundle, storage_path, options, words):
    with pytest.raises(UserError) as caught:
        check(begun(bundle, storage_path, **options))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_warm_start_refuses_a_damaged_bundle(bundle, storage_path, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    with (copy / WEIGHTS).open("r+b") as file:
        file.write(b"?")
    with pytest.raises(UserError, match=r"weights\.safetensors' differs from its digest"):
        inference.complete_config(begun(bundle, storage_path, init=str(copy)))


def test_the_lineage_keeps_the_epochs_of_the_first_run(bundle):
    """Otherwise each shortened run would shorten the runs that start from it again."""
    first = training.build_lineage("models:/digits/1", bundle)
    assert first["init_epochs"] == bundle.manifest.config["optim"]["epochs"]
    manifest = bundle.manifest.model_copy(
        update={"lineage": first, "config": {**bundle.manifest.config, "optim": {"epochs": 1}}}
    )
    second = training.build_lineage(
        "models:/digits/2", Bundle(bundle.location, bundle.path, manifest)
    )
    assert second["init_epochs"] == first["init_epochs"]
    assert json.dumps(second)


def test_a_study_refuses_the_init_option():
    from tune.cli import parse

    with pytest.raises(UserError, match="init is for a single run"):
        parse(["--init", "models:/digits@production"])
    assert cli.parse(["--init", "models:/digits/1"]).config.init == "models:/digits/1"
