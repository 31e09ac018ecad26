"""Splits by hashes of records: stable, and with equal records in the same split."""

import numpy as np
import pandas as pd
import pytest

from cluster.errors import UserError
from train.config import Data
from train.data import splits
from train.data.reading import sources
from train.data.splits import TEST, TRAIN, VALID
from train.values import value_hash

COLUMNS = ["x", "name", "label"]


@pytest.fixture
def frame(rng):
    """2,000 records, 200 of which are duplicates; one class is rare."""
    rows = pd.DataFrame(
        {
            "x": rng.normal(size=1800),
            "name": rng.choice(["a", "b", None], 1800),
            "label": rng.choice(["no", "yes", "rare"], 1800, p=[0.6, 0.397, 0.003]),
        }
    )
    return pd.concat([rows, rows[:200]], ignore_index=True)


def blocks_of(frame, path, kind="parquet"):
    path.mkdir(exist_ok=True)
    url = str(path / f"data.{kind}")
    frame.to_csv(url, index=False) if kind == "csv" else frame.to_parquet(url, index=False)
    return sources.open_source(sources.find_source(url), str(path / "opened"))


def assign(frame, path, kind="parquet", class_column="label", **data):
    config = Data(train="data", valid_fraction=0.1, test_fraction=0.15, **data)
    blocks = blocks_of(frame, path, kind)
    (part,) = splits.assign_splits(config, {"train": blocks}, COLUMNS, class_column=class_column)
    return part


def test_a_file_that_grew_keeps_its_splits(frame, tmp_path, rng):
    before = assign(frame, tmp_path / "before").codes_N
    shuffled = rng.permutation(len(frame))
    more = frame.assign(x=frame["x"] + 1)
    grown = pd.concat([frame.iloc[shuffled], more], ignore_index=True)
    after = assign(grown, tmp_path / "after", "csv").codes_N
    np.testing.assert_array_equal(after[: len(frame)], before[shuffled])


def test_equal_records_are_in_one_split(frame, tmp_path):
    codes_N = assign(frame, tmp_path).codes_N
    np.testing.assert_array_equal(codes_N[1800:], codes_N[:200])


def test_records_with_few_values_are_split_by_their_order(rng, tmp_path):
    """Most records equal another one, as records of different people may do."""
    frame = pd.DataFrame({"x": rng.integers(0, 3, 1000), "name": "a"})
    frame["label"] = np.where(frame["x"] == 0, "no", "yes")
    part = assign(frame, tmp_path / "before")
    assert "equal records may be in different splits" in part.note
    counts = pd.crosstab(frame["x"], part.codes_N, normalize="index").to_numpy()
    np.testing.assert_allclose(counts, [[0.75, 0.1, 0.15]] * 3, atol=0.09)
    more = frame.assign(x=rng.integers(0, 3, 1000))
    grown = assign(pd.concat([frame, more]), tmp_path / "after")
    np.testing.assert_array_equal(grown.codes_N[:1000], part.codes_N)


def test_another_seed_draws_other_splits(frame, tmp_path):
    one, other = (assign(frame, tmp_path, split_seed=seed).codes_N for seed in (0, 1))
    expected = 0.75**2 + 0.1**2 + 0.15**2
    assert abs((one == other).mean() - expected) < 0.05


def test_splits_have_the_requested_shares(frame, tmp_path):
    counts = np.bincount(assign(frame, tmp_path).codes_N, minlength=3) / len(frame)
    np.testing.assert_allclose(counts, [0.75, 0.1, 0.15], atol=0.04)


@pytest.mark.parametrize("count", [3, 4, 6, 10])
def test_no_split_lacks_a_class_that_has_enough_records(rng, tmp_path, count):
    frame = pd.DataFrame({"x": rng.normal(size=400), "name": "a", "label": "usual"})
    frame.loc[: count - 1, "label"] = "rare"
    part = assign(frame, tmp_path)
    for code in (TRAIN, VALID, TEST):
        assert set(frame["label"][part.codes_N == code]) == {"usual", "rare"}
    moved = assign(frame, tmp_path, class_column=None).codes_N != part.codes_N
    assert part.note == (
        f"{moved.sum()} records were moved so that no split lacks a class or is empty"
        if moved.any()
        else ""
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_with_one_or_two_records_is_in_train(rng, tmp_path, count):
    for seed in range(20):
        frame = pd.DataFrame({"x": rng.normal(size=60), "name": "a", "label": "usual"})
        frame.loc[: count - 1, "label"] = "rare"
        codes_N = assign(frame, tmp_path, split_seed=seed).codes_N
        assert "rare" in set(frame["label"][codes_N == TRAIN])


def test_no_split_of_few_records_is_empty(rng, tmp_path):
    for seed in range(30):
        frame = pd.DataFrame({"x": rng.normal(size=20), "name": "a", "label": rng.normal(size=20)})
        codes_N = assign(frame, tmp_path, class_column=None, split_seed=seed).codes_N
        assert set(codes_N) == {TRAIN, VALID, TEST}
    with pytest.raises(UserError, match="has 8 records; at least 20 are needed to split"):
        assign(frame[:8], tmp_path, class_column=None)


def test_keys_stay_together_when_records_move_for_a_class(rng, tmp_path):
    frame = pd.DataFrame(
        {"x": rng.normal(size=300), "name": np.repeat(np.arange(60), 5).astype(str)}
    )
    frame["label"] = np.where(frame["name"].isin(["3", "30", "42", "55"]), "rare", "usual")
    codes_N = assign(frame, tmp_path, split_key="name").codes_N
    for start in range(0, 300, 5):
        assert len(set(codes_N[start : start + 5])) == 1
    for code in (TRAIN, VALID, TEST):
        assert set(frame["label"][codes_N == code]) == {"usual", "rare"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2, 3], [1.0, 2.0, 3.0]),
        ([1, 2, 3], ["1", "2.0", "3"]),
        ([1.5, None, 0.0], [1.5, float("nan"), -0.0]),
        (["a", "", "c"], ["a", None, "c"]),
        ([[1, "x"], [2.0]], [[1.0, "x"], [2]]),
    ],
)
def test_equal_values_have_equal_hashes(one, other):
    np.testing.assert_array_equal(value_hash.hash_values(one), value_hash.hash_values(other))


@pytest.mark.parametrize("one", ["a", 1, 1.0000001, b"a", [1], None])
@pytest.mark.parametrize("other", ["b", 2, 1.5, b"b", [1, 1]])
def test_different_values_have_different_hashes(one, other):
    hash_N = value_hash.hash_values([one, other])
    assert hash_N[0] != hash_N[1]


def test_arrays_and_lists_have_the_same_hashes(rng):
    values = rng.normal(size=50)
    as_list = value_hash.hash_values(values.tolist())
    np.testing.assert_array_equal(value_hash.hash_values(values), as_list)
    whole = np.arange(-5, 5)
    np.testing.assert_array_equal(
        value_hash.hash_values(whole), value_hash.hash_values(whole.tolist())
    )


def test_hash_fractions_are_uniform_for_each_seed():
    hash_N = value_hash.mix(np.arange(100_000, dtype=np.uint64))
    one, other = value_hash.fractions(hash_N, 0), value_hash.fractions(hash_N, 1)
    for places_N in (one, other):
        counts = np.histogram(places_N, 20, (0, 1))[0]
        assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_the_hash_does_not_depend_on_the_column_order(frame):
    columns = {name: frame[name].tolist() for name in COLUMNS}
    hashes = [value_hash.hash_columns(columns, names, 2000) for names in (COLUMNS, COLUMNS[::-1])]
    np.testing.assert_array_equal(*hashes)
    swapped = {**columns, "name": columns["label"], "label": columns["name"]}
    assert not np.any(hashes[0] == value_hash.hash_columns(swapped, COLUMNS, 2000))
