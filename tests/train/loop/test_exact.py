"""Runs are reproducible: stopped, resumed or on other workers, they give the same weights.

The workers are processes connected by gloo, as in Ray Train, but without Ray.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import make_config
from tests.gloo import run_workers
from tests.train.nets.pretrained_checkpoints import save_checkpoint
from tests.train.tasks.test_tasks import image_bytes
from train.bundle.bundle import WEIGHTS
from train.config import validate_config
from train.data import batch_sampler, dataset
from train.data.schema import inference
from train.loop import parallelism
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Loop
from train.loop.run_directory import NO_LESSON, DistillationConfig
from train.pretrained.backbone import attach_backbone

NUM_MICRO_BATCHES = 2


class Stop(Exception):
    """Raised by a test to end a run as a crash would."""


class Recorded(Loop):
    """Loop that writes down the samples of every step and can stop after a checkpoint."""

    def __init__(self, *arguments, notes, stop_at=None, **options):
        self._notes, self._stop_at = Path(notes), stop_at
        super().__init__(*arguments, **options)

    def _loss(self, ids_B, micro_batch):
        file = self._notes / f"{self._worker.world_size}-{self._worker.rank}.jsonl"
        with file.open("a") as notes:
            notes.write(json.dumps([self.progress.step, ids_B.tolist()]) + "\n")
        return super()._loss(ids_B, micro_batch)

    def _after_step(self):
        super()._after_step()
        if self.progress.step == self._stop_at:
            self._save()
            self._settle()
            raise Stop


def loop(worker, config, shards, folder, notes, stop_at=None, lesson=NO_LESSON):
    store = CheckpointManager(str(folder), keep=2)
    options = {
        "num_micro_batches": NUM_MICRO_BATCHES,
        "notes": notes,
        "stop_at": stop_at,
        "lesson": lesson,
    }
    with contextlib.suppress(Stop):
        Recorded(config, shards, worker, store, **options).run()


def noted(notes):
    """Return the sample ids by step."""
    steps: dict[int, list[int]] = {}
    for file in sorted(Path(notes).glob("*.jsonl")):
        for line in file.read_text().splitlines():
            step, ids = json.loads(line)
            steps.setdefault(step, []).extend(ids)
    return steps


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def undisturbed(config, digits, tmp_path_factory):
    """Weights and history of an undisturbed run on two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_workers(2, loop, config, digits, folder / "run", folder)
    return load_best_weights(CheckpointManager(str(folder / "run"), keep=2))


@pytest.mark.slow
def test_two_workers_and_one_give_the_same_weights(config, digits, undisturbed, tmp_path):
    run_workers(1, loop, config, digits, tmp_path / "run", tmp_path)
    weights, history = load_best_weights(CheckpointManager(str(tmp_path / "run"), keep=2))
    assert_same(weights, undisturbed[0])
    for row, other in zip(history, undisturbed[1], strict=True):
        assert row["valid_loss"] == other["valid_loss"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)


@pytest.mark.slow
def test_runs_on_changing_workers_see_each_sample_once(config, digits, undisturbed, tmp_path):
    count = len(digits.open("train")[1])
    per_epoch = batch_sampler.num_steps(count, config.optim.batch_size)
    stops = (per_epoch // 3, per_epoch + per_epoch // 2, None)
    for world_size, stop_at in zip((2, 1, 2), stops, strict=True):
        run_workers(world_size, loop, config, digits, tmp_path / "run", tmp_path, stop_at)
    steps = noted(tmp_path)
    assert sorted(steps) == list(range(per_epoch * config.optim.epochs))
    for epoch in range(config.optim.epochs):
        seen = [
            sample
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
            for sample in steps[step]
        ]
        assert sorted(seen) == list(range(count))
    weights, history = load_best_weights(CheckpointManager(str(tmp_path / "run"), keep=2))
    assert_same(weights, undisturbed[0])
    assert [row["valid_loss"] for row in history] == [row["valid_loss"] for row in undisturbed[1]]


@pytest.mark.slow
def test_a_warm_start_ends_the_same_on_2_then_1_workers(config, digits, undisturbed, tmp_path):
    save_file(undisturbed[0], tmp_path / WEIGHTS)
    lesson = DistillationConfig(start=str(tmp_path))
    run_workers(1, loop, config, digits, tmp_path / "whole", tmp_path, None, lesson)
    for world_size, stop_at in ((2, 5), (1, None)):
        parts = tmp_path / "parts"
        run_workers(world_size, loop, config, digits, parts, tmp_path, stop_at, lesson)
    (weights, history), (others, _) = (
        load_best_weights(CheckpointManager(str(tmp_path / name), keep=2))
        for name in ("whole", "parts")
    )
    assert_same(others, weights)
    # The run continued from the given weights.
    assert history[0]["train_loss"] < undisturbed[1][-1]["train_loss"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Config of texts with 0 to 60 words, of which the labels are the rarer ones."""
    folder = tmp_path_factory.mktemp("texts")
    draws = np.random.default_rng(0)
    lines = ["text,label"]
    for number in range(400):
        words = draws.choice(["a", "b", "c", "d", "e", "f"], draws.geometric(0.1) % 60)
        lines.append(f"{' '.join(words)},{'yes' if number % 3 else 'no'}")
    (folder / "texts.csv").write_text("\n".join(lines) + "\n")
    return validate_config(
        {
            "data": {"train": str(folder / "texts.csv")},
            "features": {"text": "text"},
            "target": "label",
            "task_type": "classification",
            "net": {"text": "transformer", "text_width": 16, "text_dropout": 0.1},
            "optim": {"epochs": 2, "batch_size": 16, "name": "adamw", "batch_by": "tokens"},
            "storage": {"path": str(folder)},
        }
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Config of pictures that keep their aspect ratio, mirrored and shifted."""
    folder = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    rows = [
        {
            "picture": image_bytes(
                draws.integers(0, 250, (draws.integers(8, 60), 16, 3), dtype=np.uint8)
            ),
            "label": "yes" if number % 3 else "no",
        }
        for number in range(300)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return validate_config(
        {
            "data": {"train": str(folder / "train.parquet")},
            "features": {"picture": {"kind": "image", "size": [None, 16]}},
            "target": "label",
            "task_type": "classification",
            "net": {"widths": [8, 12]},
            "augment": {"flip": True, "translate": 2},
            "optim": {"epochs": 2, "batch_size": 16},
            "storage": {"path": str(folder)},
        }
    )


@pytest.fixture(scope="module")
def pretrained(texts, tmp_path_factory):
    """Config of the texts with a pretrained encoder, of which a layer is frozen."""
    pytest.importorskip("transformers", reason="halyard[text] is not installed")
    given = texts.model_dump(mode="json", exclude_unset=True)
    given["net"] = {
        "pretrained": str(save_checkpoint(tmp_path_factory.mktemp("checkpoint"))),
        "freeze": 1,
    }
    return inference.complete_config(validate_config(given)).config


@pytest.fixture(scope="module")
def adapted(pretrained):
    """Config of the texts with low-rank adapters of a pretrained encoder."""
    given = pretrained.model_dump(mode="json", exclude_unset=True)
    given["net"] = {**given["net"], "freeze": "none", "lora": {"rank": 2}}
    return validate_config(given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "pictures", "pretrained", "adapted"])
def test_free_lengths_end_the_same_on_1_worker_as_on_2(kind, request, tmp_path):
    config = request.getfixturevalue(kind)
    data = attach_backbone(config, dataset.prepare_dataset(config, config.storage.path))
    inputs, targets_N = data.open("train")
    (stored,) = inputs.values()
    assert len(set(stored.lengths_N)) > 20
    run_workers(1, loop, config, data, tmp_path / "whole", tmp_path)
    (tmp_path / "notes").mkdir()
    for world_size, stop_at in ((2, 7), (1, 30), (2, None)):
        parts = tmp_path / "parts"
        run_workers(world_size, loop, config, data, parts, tmp_path / "notes", stop_at)
    weights, others = (
        load_best_weights(CheckpointManager(str(tmp_path / name), keep=2))[0]
        for name in ("whole", "parts")
    )
    assert_same(others, weights)
    steps = noted(tmp_path / "notes")
    per_epoch = batch_sampler.num_steps(len(targets_N), config.optim.batch_size)
    assert sorted(steps) == list(range(2 * per_epoch))
    for epoch in range(2):
        own = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(i for step in own for i in steps[step]) == list(range(len(targets_N)))


EVERYTHING = {
    "optim": {
        "name": "adamw",
        "lr": 0.01,
        "epochs": 2,
        "batch_size": 128,
        "ema_decay": 0.95,
        "clip_norm": 1.0,
        "warmup_fraction": 0.1,
        "schedule": "cosine",
    },
    "augment": {
        "translate": 1,
        "flip": True,
        "mixup": 0.2,
        "cutmix": 1.0,
        "crop_area": 0.7,
        "cutout": 2,
        "stages": [{"until": 0.3, "scale": 0.75}, {"until": 1.0, "crop": 0.8}],
    },
}


@pytest.mark.parametrize("extra", [{}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_a_resumed_run_with_all_options_ends_the_same(extra, digits, tmp_path, config):
    options = {**EVERYTHING, **extra, "storage": {"path": config.storage.path}}
    full = make_config(**options)
    run_workers(1, loop, full, digits, tmp_path / "whole", tmp_path)
    for stop_at in (3, 12, None):
        run_workers(1, loop, full, digits, tmp_path / "parts", tmp_path, stop_at)
    whole, parts = (
        load_best_weights(CheckpointManager(str(tmp_path / name), keep=2))
        for name in ("whole", "parts")
    )
    assert_same(parts[0], whole[0])
    assert [row["valid_loss"] for row in parts[1]] == [row["valid_loss"] for row in whole[1]]


class Plain(nn.Module):
    """A net without statistics over the batch, so that micro-batches may be of any size."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, images_BHWC):
        return self.head(self.blocks(images_BHWC.float().flatten(1) / 255))


def plain_loop(worker, config, shards, folder, num_micro_batches):
    Loop(
        config,
        shards,
        worker,
        CheckpointManager(str(folder), keep=2),
        num_micro_batches=num_micro_batches,
        build=lambda config, task: Plain(),
    ).run()


def assert_close(weights, others, tolerance):
    for name, value in weights.items():
        scale = others[name].abs().max()
        assert (value - others[name]).abs().max() <= tolerance * scale, name


def test_four_micro_batches_of_32_equal_one_of_128(config, digits, tmp_path):
    results = []
    for num_micro_batches in (1, 4):
        one_epoch = make_config(
            optim={"epochs": 1, "batch_size": 128}, storage={"path": config.storage.path}
        )
        folder = tmp_path / str(num_micro_batches)
        run_workers(1, plain_loop, one_epoch, digits, folder, num_micro_batches)
        results.append(load_best_weights(CheckpointManager(str(folder), keep=2))[0])
    assert_close(results[0], results[1], 1e-6)


@pytest.mark.slow
def test_fsdp_equals_ddp_after_20_steps(config, digits, tmp_path):
    results = {}
    batch_size = len(digits.open("train")[1]) // 10
    for kind in ("ddp", "fsdp"):
        twenty = make_config(
            # At a low rate, so that rounding errors do not grow.
            optim={"epochs": 2, "batch_size": batch_size, "lr": 0.02},
            workers={"parallel": kind},
            storage={"path": config.storage.path},
        )
        assert 2 * batch_sampler.num_steps(len(digits.open("train")[1]), batch_size) == 20
        folder = tmp_path / kind
        run_workers(2, loop, twenty, digits, folder, tmp_path)
        results[kind] = load_best_weights(CheckpointManager(str(folder), keep=2))[0]
    assert_close(results["fsdp"], results["ddp"], 1e-5)


def gradients_of(worker, kind, folder):
    torch.manual_seed(0)
    net = Plain()
    collect = {
        "exact": parallelism.ExactGradients,
        "overlapped": parallelism.OverlappedGradients,
    }[kind](net, worker)
    data = torch.from_numpy(np.random.default_rng(0).random((4, 8, 64), dtype=np.float32))
    micro_batches = worker.micro_batches(4)
    for micro_batch in micro_batches:
        with collect.micro_batch(last=micro_batch == micro_batches[-1]):
            (collect.forward(data[micro_batch]).square().mean() / 4).backward()
    collect.finish()
    if worker.rank == 0:
        torch.save([param.grad for param in net.parameters()], folder / f"{kind}.pt")


@pytest.mark.slow
def test_overlapped_gradients_equal_exact_ones(tmp_path):
    for kind in ("exact", "overlapped"):
        run_workers(2, gradients_of, kind, tmp_path)
    exact, overlapped = (
        torch.load(tmp_path / f"{kind}.pt", weights_only=True) for kind in ("exact", "overlapped")
    )
    for one, other in zip(exact, overlapped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_mixed_inputs_with_dropout_train_the_same_on_2_workers(tmp_path, rng):
    """Images, numbers, categories and texts in one net; the labels follow from two of them."""
    count = 160
    towns = rng.choice(["Ulm", "Bern"], count)
    words = rng.choice(["sun", "rain", "snow"], count)
    table = pa.table(
        {
            "size": rng.normal(size=count),
            "town": towns,
            "note": [f"there was {word} all day" for word in words],
            "photo": [
                image_bytes(image) for image in rng.integers(0, 256, (count, 8, 8), np.uint8)
            ],
            "tags": [[town, word] for town, word in zip(towns, words, strict=True)],
        }
    )
    path = tmp_path / "mixed.parquet"
    pyarrow.parquet.write_table(table, path)
    config = make_config(
        features={"size": "number", "town": "category", "note": "text", "photo": "image"},
        target="tags",
        task_type="multilabel",
        data={"train": str(path)},
        net={"widths": [4, 8], "hidden": [32]},
        optim={"name": "adamw", "lr": 0.01, "epochs": 30, "batch_size": 32, "label_smoothing": 0.0},
    )
    data = dataset.prepare_dataset(config, str(tmp_path))
    for world_size in (1, 2):
        (tmp_path / f"notes{world_size}").mkdir()
        arguments = (config, data, tmp_path / f"{world_size}", tmp_path / f"notes{world_size}")
        run_workers(world_size, loop, *arguments)
    weights, history = load_best_weights(CheckpointManager(str(tmp_path / "1"), keep=1))
    assert_same(weights, load_best_weights(CheckpointManager(str(tmp_path / "2"), keep=1))[0])
    # Chance gives 0.5; one wrong label in one of the 16 held-out records gives 0.97.
    assert history[-1]["valid_f1"] > 0.9
