"""Records whose lists differ in length: stored without padding, and read again as encoded."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.errors import CommandFailed, UserError
from tests.conftest import make_config
from train.cross_validation import _Fold
from train.data import dataset, preprocess, splits
from train.data.split_writer import input_files
from train.tasks import ClassTarget, Features, InvalidRecord, Task, TensorSpec
from train.tasks.custom_classes import check_custom_classes
from train.tasks.plugins import allow_modules
from train.values import ragged
from train.values.ragged import FREE
from train.values.records import is_missing


@dataclass(frozen=True)
class Walk:
    """Encodes lists of steps, as JSON, as float32 [N, L, 2]: each step, which is not 0, and 1."""

    column: str
    kind = f"{__name__}:Walk"

    @property
    def fields(self):
        return (TensorSpec(self.column, "BYTES", ()),)

    @property
    def inputs(self):
        return (TensorSpec(self.column, "FP32", (FREE, 2)),)

    def fit(self, columns):
        return self

    def encode(self, columns):
        walks = [[] if is_missing(text) else json.loads(text) for text in columns[self.column]]
        steps_NL2 = np.zeros((len(walks), max([1, *map(len, walks)]), 2), np.float32)
        for row, walk in enumerate(walks):
            if 0 in walk:
                raise InvalidRecord(f"field '{self.column}' has a step of 0.", row)
            steps_NL2[row, : len(walk)] = np.array([[step, 1] for step in walk]).reshape(-1, 2)
        return {self.column: steps_NL2}

    def to_dict(self):
        return {"kind": self.kind, "column": self.column}

    @classmethod
    def from_dict(cls, state):
        return cls(state["column"])


class NoWidth(Walk):
    """Forgets the last dimension."""

    kind = f"{__name__}:NoWidth"

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column][:, :, 0]}


WORDS = ["one", "two", "three", "four", "five"]


@pytest.fixture
def records(tmp_path, rng):
    """The config of 300 records with two texts and a list; the first 20 have none of them."""
    rows = []
    for number in range(300):
        title, body = (" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(2))
        walk = json.dumps(rng.integers(1, 9, rng.integers(0, 5)).tolist())
        rows.append({"title": title, "body": body, "walk": walk, "label": str(number % 2)})
        if number < 20:
            rows[-1] = {"title": None, "body": None, "walk": None, "label": str(number % 2)}
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    allow_modules([__name__])
    return make_config(
        data={"train": str(path), "split_seed": 3},
        features={"title": "text", "body": "text", "walk": Walk.kind},
        target="label",
        storage={"path": str(tmp_path / "runs")},
        net={"class_path": "not.needed:Here"},
    )


def test_records_are_stored_without_padding(records):
    data = dataset.prepare_dataset(records, records.storage.path)
    features, total = data.task.features, 0
    for split in splits.NAMES:
        inputs, targets_N = data.open(split)
        total += len(targets_N)
        assert list(inputs) == ["tokens", "walk"]
        for number, spec in enumerate(features.inputs):
            array = inputs[spec.name]
            assert (len(array), array.dtype) == (len(targets_N), spec.dtype)
            stored = np.load(data.folder / split / input_files(number)[0])
            assert stored.shape == (array.lengths_N.sum(), *spec.shape[1:])
            np.testing.assert_array_equal(stored != 0, True)
            batch = array[np.arange(0, len(array), 3)]
            np.testing.assert_array_equal(batch, ragged.trim(batch))
    assert total == 300
    inputs = data.open("train")[0]
    assert len(set(inputs["tokens"].lengths_N)) > 10
    assert inputs["walk"].lengths_N.min() == 0


def test_each_record_is_stored_as_it_is_encoded_alone(records):
    data = dataset.prepare_dataset(records, records.storage.path)
    table = pyarrow.parquet.read_table(records.data.train).to_pylist()
    expected = sorted(
        (
            data.task.features.encode_records([row])["tokens"].tobytes(),
            data.task.features.encode_records([row])["walk"].tobytes(),
        )
        for row in table
    )
    found = []
    for split in splits.NAMES:
        tokens, walks = data.open(split)[0].values()
        found += [
            (tokens[row : row + 1].tobytes(), walks[row : row + 1].tobytes())
            for row in range(len(tokens))
        ]
    assert sorted(found) == expected


def test_parts_of_cross_validation_are_not_padded(records):
    data = dataset.prepare_dataset(records, records.storage.path)
    whole = data.open("train")[0]["tokens"]
    fold = _Fold(data.url, data.summary, (1, 4), 0)
    parts = [fold.open(split)[0]["tokens"] for split in ("train", "valid")]
    assert sum(part.lengths_N.sum() for part in parts) == whole.lengths_N.sum()
    assert sum(map(len, parts)) == len(whole)


def test_long_texts_are_counted_in_the_report(records):
    whole = dataset.prepare_dataset(records, records.storage.path)
    lengths = np.concatenate([whole.open(split)[0]["tokens"].lengths_N for split in splits.NAMES])
    config = records.model_copy(update={"text": records.text.model_copy(update={"max_tokens": 8})})
    cut = dataset.prepare_dataset(config, records.storage.path)
    (note,) = (note for note in cut.summary["report"]["notes"] if "text.max_tokens" in note)
    count = int(np.sum(lengths >= 8))
    assert note.startswith(f"texts: {count} records ({count / 300:.1%}) have at least")
    assert cut.open("train")[0]["tokens"].lengths_N.max() == 8
    assert not [note for note in whole.summary["report"]["notes"] if "text.max_tokens" in note]


def test_equal_records_are_found_whatever_they_are_encoded_with(records):
    data = dataset.prepare_dataset(records, records.storage.path)
    assert sum(data.summary["report"]["duplicates"].values()) >= 17


@pytest.mark.ray
def test_ray_data_and_threads_store_the_same(records, tmp_path, monkeypatch, ray_session):
    config = records.model_copy(update={"features": {"title": records.features["title"]}})
    local = dataset.prepare_dataset(config, str(tmp_path / "local"))
    monkeypatch.setattr(preprocess, "LARGE_BYTES", 0)
    spread = dataset.prepare_dataset(config, str(tmp_path / "spread"))
    assert spread.summary == local.summary
    for split in splits.NAMES:
        one, other = (data.open(split)[0]["tokens"] for data in (local, spread))
        np.testing.assert_array_equal(one.values_T, other.values_T)
        np.testing.assert_array_equal(one.offsets, other.offsets)


def test_offsets_that_do_not_fit_the_values_are_refused(records, monkeypatch):
    data = dataset.prepare_dataset(records, records.storage.path)
    monkeypatch.setattr(dataset, "_check_once", lambda folder, name: None)
    offsets = data.folder / "train" / input_files(0)[1]
    np.save(offsets, np.load(offsets)[:-1])
    with pytest.raises(CommandFailed, match="offsets of the rows do not fit") as error:
        data.open("train")
    assert "\n" not in str(error.value)


def test_a_damaged_file_of_offsets_is_encoded_again(records, capsys):
    data = dataset.prepare_dataset(records, records.storage.path)
    dataset._check_once.cache_clear()
    offsets = data.folder / "train" / input_files(0)[1]
    offsets.write_bytes(offsets.read_bytes()[:-8])
    again = dataset.prepare_dataset(records, records.storage.path)
    assert "encoding the records again" in capsys.readouterr().err
    assert again.open("train")[0]["tokens"].lengths_N.sum() > 0


def test_a_wrong_shape_of_a_custom_list_is_named():
    allow_modules([__name__])
    target = ClassTarget("y").fit(["a", "b"])
    words = r"'walk' float32 \[2, 2\]; .* 'walk' float32 \[2, -1, 2\]"
    with pytest.raises(UserError, match=words):
        check_custom_classes(
            Task(Features((NoWidth("walk"),)), target), {"walk": ["[1]", "[2, 3]"]}
        )
    check_custom_classes(Task(Features((Walk("walk"),)), target), {"walk": ["[1]", "[2, 3]"]})
