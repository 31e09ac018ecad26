"""Merging of category names that are unrelated to the target."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from train.config import validate_config
from train.data import dataset
from train.data.fit_notes import format_share
from train.data.name_evidence import interaction_gain, merge_noise
from train.tasks import Categories, Task
from train.tasks.columns.categorical import FIRST, MISSING, UNSEEN

COUNT = 6000


@pytest.fixture
def prepare(tmp_path):
    def encode(frame, kinds, task_type, **data):
        url = str(tmp_path / "records.parquet")
        frame.to_parquet(url, index=False)
        values = {"name": "x", "target": "y", "task_type": task_type, "features": kinds}
        config = validate_config({**values, "data": {"train": url, **data}})
        return dataset.prepare_dataset(config, str(tmp_path / "runs"))

    return encode


@pytest.fixture
def frame(rng):
    """Two columns of 150 names, of which one affects the target, and a column of two names."""
    shop, town = (rng.integers(0, 150, COUNT) for _ in range(2))
    effects = rng.normal(size=150)
    score = effects[shop] + rng.normal(size=COUNT)
    return pd.DataFrame(
        {
            "shop": np.char.add("s", shop.astype(str)),
            "town": np.where(rng.random(COUNT) < 0.05, None, np.char.add("t", town.astype(str))),
            "size": rng.choice(["small", "large"], COUNT),
            "score": score,
        }
    )


KINDS = {"shop": "category", "town": "category", "size": "category"}
TARGETS = {
    "classification": lambda score: np.where(score > 1.5, "yes", "no"),
    "regression": lambda score: score,
    "multilabel": lambda score: np.where(score > 0, "a|b", np.where(score > -1, "b", "")),
}


@pytest.mark.parametrize("task_type", TARGETS)
def test_names_unrelated_to_the_target_are_merged(prepare, frame, task_type):
    """For targets of every type. A column with few names is never merged."""
    data = prepare(frame.assign(y=TARGETS[task_type](frame["score"])), KINDS, task_type)
    (categories,) = data.task.features.encoders
    assert isinstance(categories, Categories)
    assert [len(names) for names in categories.names_C] == [150, 0, 2]
    (note,) = data.summary["report"]["notes"]
    assert note.startswith("the 150 names of 'town' are merged")
    assert "'town'" in (data.folder / "report.txt").read_text()
    codes_NC = data.open("train")[0]["categories"]
    assert (codes_NC[:, 0] >= FIRST).all()
    assert set(np.unique(codes_NC[:, 1])) == {UNSEEN, MISSING}
    restored = Task.from_dict(data.task.to_dict()).features
    new = restored.encode({"shop": ["s3"], "town": ["t3"], "size": ["never"]})["categories"]
    assert new.tolist() == [[categories.names_C[0].index("s3") + FIRST, UNSEEN, UNSEEN]]


def test_all_names_are_kept_without_merge_noise(prepare, frame):
    data = prepare(
        frame.assign(y=TARGETS["classification"](frame["score"])),
        KINDS,
        "classification",
        merge_noise=False,
    )
    (categories,) = data.task.features.encoders
    assert [len(names) for names in categories.names_C] == [150, 150, 2]
    assert data.summary["report"]["notes"] == []


def test_names_that_matter_only_in_combination_are_kept(rng):
    """Ratings are products of user and item factors; each column alone is uninformative."""
    users, items = rng.integers(0, 100, 6_000), rng.integers(0, 80, 6_000)
    taste, kind = rng.normal(size=(100, 2)), rng.normal(size=(80, 2))
    taste, kind = taste - taste.mean(axis=0), kind - kind.mean(axis=0)
    ratings = (taste[users] * kind[items]).sum(axis=1) + rng.normal(size=6_000)
    assert interaction_gain(users, items, ratings) > 10
    assert interaction_gain(users, items, rng.permutation(ratings)) < 0
    alone = rng.normal(size=100)[users] + rng.normal(size=80)[items] + rng.normal(size=6_000)
    assert interaction_gain(users, items, alone) < 0
    noise = rng.integers(0, 50, 6_000)
    sample = {"user": users, "item": items, "noise": noise, "y": ratings}
    task = Task.of({name: {"kind": "category"} for name in list(sample)[:3]}, "y", "regression")
    task = replace(task, features=task.features.fit(sample), target=task.target.fit(ratings))
    merged, notes = merge_noise(task, sample, [])
    (encoder,) = merged.features.encoders
    kept = {name for name, each in zip(encoder.columns, encoder.names_C, strict=True) if each}
    assert kept == {"user", "item"}
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0.0%"), (1 / 30_000, "0.0033%"), (0.00054, "0.054%"), (0.0012, "0.1%"), (1, "100.0%")],
)
def test_small_shares_are_shown_with_two_digits(share, words):
    assert format_share(share) == words
