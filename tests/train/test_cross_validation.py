"""Cross-validation: the number of epochs that it chooses, and runs that train for it."""

import json

import numpy as np
import pytest
import torch

from cluster.errors import CommandFailed, UserError
from tests.conftest import make_config
from train.config import LAST, validate_config
from train.cross_validation import choose_epochs
from train.data import dataset
from train.data.schema import inference
from train.loop.checkpoint import CheckpointManager
from train.loop.loop import Loop
from train.loop.parallelism import Worker


@pytest.fixture
def table(tmp_path, rng):
    """260 records with a weak signal, which a net overfits."""
    numbers_NF = rng.normal(size=(260, 8))
    classes_N = numbers_NF[:, 0] + rng.normal(size=260) > 0
    path = tmp_path / "few.csv"
    names = [f"n{index}" for index in range(8)]
    rows = [",".join(map(str, row)) for row in np.c_[numbers_NF, classes_N.astype(int)]]
    path.write_text("\n".join([",".join([*names, "y"]), *rows]))
    return path


def completed(table, **changes):
    values = {
        "name": "few",
        "target": "y",
        "data": {"train": str(table)},
        "storage": {"path": str(table.parent / "runs")},
        "workers": {"num": 1},
        **changes,
    }
    return inference.complete_config(validate_config(values)).config


def test_the_number_of_epochs_with_the_least_loss_is_chosen(table):
    config = completed(table)
    assert config.stop.folds == 5
    data = dataset.prepare_dataset(config, config.storage.root)
    epochs, rows = choose_epochs(config, data)
    losses = [row["valid_loss"] for row in rows]
    assert rows[epochs - 1]["epoch"] == epochs == int(np.argmin(losses)) + 1
    # It stops `patience` epochs after the best one, before the last epoch.
    assert len(rows) == epochs + config.stop.patience < config.optim.epochs
    assert choose_epochs(config, data) == (epochs, rows)


def test_every_training_record_is_held_out_once(table, monkeypatch):
    config = completed(table)
    data = dataset.prepare_dataset(config, config.storage.root)
    seen = []

    class Recorded(Loop):
        def __init__(self, config, shards, *args, **options):
            seen.append([shards.open(name)[0]["numbers"] for name in ("train", "valid")])
            super().__init__(config, shards, *args, **options)

    monkeypatch.setattr("train.cross_validation.Loop", Recorded)
    choose_epochs(config, data)
    whole_NF = np.array(data.open("train")[0]["numbers"])
    assert len(seen) == 5
    for parts in seen:
        assert sorted(np.concatenate(parts).tolist()) == sorted(whole_NF.tolist())
    held_out_NF = np.concatenate([valid for _, valid in seen])
    assert sorted(held_out_NF.tolist()) == sorted(whole_NF.tolist())


def test_a_diverging_net_fails_cross_validation(table):
    config = completed(table, optim={"name": "sgd", "lr": 10, "weight_decay": 1})
    data = dataset.prepare_dataset(config, config.storage.root)
    with pytest.raises(CommandFailed, match=r"cross-validation failed: .* lower optim\.lr"):
        choose_epochs(config, data)


def test_fewer_records_than_folds_make_fewer_folds(tmp_path):
    path = tmp_path / "tiny.csv"
    path.write_text("n,y\n" + "".join(f"{n},{n % 2}\n" for n in range(4)))
    data = {"train": str(path), "valid": str(path), "test": str(path)}
    config = completed(path, optim={"epochs": 2}, data=data)
    data = dataset.prepare_dataset(config, config.storage.root)
    assert data.summary["splits"]["train"]["num_records"] < 5
    epochs, rows = choose_epochs(config, data)
    assert 1 <= epochs <= len(rows) == 2


def test_a_run_ends_after_the_chosen_epoch(digits, tmp_path, config):
    stop = {"after": 2, "metric": "valid_loss", "patience": 5}
    changed = make_config(
        optim={"epochs": 6},
        stop=stop,
        checkpoint={"metric": LAST},
        storage={"path": str(tmp_path)},
    )
    store = CheckpointManager(str(tmp_path / "checkpoints"), 2)
    store.claim(store.hand_over())
    loop = Loop(changed, digits, Worker(0, 1, torch.device("cpu")), store, num_micro_batches=2)
    loop.run()
    assert [row["epoch"] for row in loop.progress.history] == [1, 2]
    assert loop.progress.best_step == loop.progress.step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop": {"folds": 5}}, "needs stop.metric"),
        ({"stop": {"folds": 1, "metric": "valid_loss"}}, "at least 2"),
        (
            {
                "stop": {"folds": 5, "metric": "valid_loss"},
                "checkpoint": {"metric": "valid_accuracy"},
            },
            "both choose the epoch; give only one",
        ),
    ],
)
def test_options_that_contradict_folds_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        make_config(**changes)


def test_a_given_checkpoint_metric_turns_folds_off(table):
    config = completed(table, checkpoint={"metric": "valid_auc"})
    assert (config.stop.folds, config.epoch_metric) == (0, "valid_auc")
    assert completed(table).epoch_metric == "valid_loss"


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_run_keeps_the_chosen_number_of_epochs(ray_session, table, capfd):
    """The card in the bundle also says how they were chosen."""
    from train.training import train_bundle

    config = completed(table, optim={"epochs": 40}, compress={"variants": []})
    bundle = train_bundle(config)
    rows = json.loads((bundle.path / "report" / "cross_validation.json").read_text())
    history = json.loads((bundle.path / "report" / "history.json").read_text())
    best = min(rows, key=lambda row: row["valid_loss"])
    assert len(history) == best["epoch"]
    card = (bundle.path / "report" / "card.html").read_text()
    assert f"Cross-validation with 5 folds of the training records selected {len(history)}" in card
    assert "choosing the number of epochs over 5 folds" in capfd.readouterr().err
    (name,) = [path.name for path in (table.parent / "runs" / "train").iterdir()]
    again = train_bundle(config.model_copy(update={"resume": name}))
    assert "choosing" not in capfd.readouterr().err
    assert again.manifest.metrics == bundle.manifest.metrics
