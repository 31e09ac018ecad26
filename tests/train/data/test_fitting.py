"""Columns with many names: which of them say something of the target."""

import numpy as np
import pandas as pd
import pytest

from train.config import validate_config
from train.data import dataset
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
    """Two columns of 150 names; the target differs by those of one. And one of few names."""
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
def test_names_that_say_nothing_of_the_target_are_merged(prepare, frame, task_type):
    """The target is of any type; a few names are left as they are, whatever they say."""
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


def test_all_names_are_kept_where_that_is_asked_for(prepare, frame):
    data = prepare(
        frame.assign(y=TARGETS["classification"](frame["score"])),
        KINDS,
        "classification",
        merge_noise=False,
    )
    (categories,) = data.task.features.encoders
    assert [len(names) for names in categories.names_C] == [150, 150, 2]
    assert data.summary["report"]["notes"] == []
