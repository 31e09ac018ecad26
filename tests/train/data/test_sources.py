"""Sources of every format, against pandas; splits by key and time; errors for bad files."""

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from cluster.errors import UserError
from tests.conftest import make_config
from tests.train.tasks.test_tasks import image_bytes
from train.data import dataset, fitting, preprocess, splits
from train.data.reading import readers, sources
from train.data.reading.csv_files import CsvOptions
from train.data.reading.samples import sample_source

TABLE = {
    "n": [1.5, 2.0, None, 4.25, -1.0, 0.0] * 20,
    "c": ["x", "y, z", None, 'say "x"', "ä\nö", "x"] * 20,
    "y": list(range(120)),
}
KINDS = {"n": "number", "c": "category"}


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(TABLE)


def table_config(url: str, **changes: object):
    data = {"train": url, **changes.pop("data", {})}
    return make_config(
        **{"data": data, "features": KINDS, "target": "y", "task_type": "regression", **changes}
    )


def read_all(url: str, scratch: Path) -> dict[str, list]:
    blocks = sources.open_source(sources.find_source(url), str(scratch))
    found: dict[str, list] = {}
    for block in blocks:
        for batch in block.read(sources.source_schema(blocks).names):
            for name, values in sources.batch_columns(batch).items():
                found.setdefault(name, []).extend(values)
    return found


def write(frame: pd.DataFrame, kind: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"data.{kind}"
    if kind == "parquet":
        frame.to_parquet(path, row_group_size=50)
    elif kind in ("csv", "csv.gz"):
        frame.to_csv(path, index=False)
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        pa.feather.write_feather(pa.Table.from_pandas(frame), path, compression="uncompressed")
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "tsv", "jsonl", "feather"])
def test_every_format_gives_the_same_arrays(frame, tmp_path, kind):
    reference = dataset.prepare_dataset(
        table_config(write(frame, "parquet", tmp_path)), str(tmp_path / "a")
    )
    prepared = dataset.prepare_dataset(
        table_config(write(frame, kind, tmp_path / kind)), str(tmp_path / "b")
    )
    for name in splits.NAMES:
        expected, targets = reference.open(name)
        inputs, others = prepared.open(name)
        np.testing.assert_array_equal(others, targets)
        for key, array in expected.items():
            np.testing.assert_array_equal(inputs[key], array)


def test_folders_and_globs_are_read_in_the_order_of_their_files(frame, tmp_path):
    folder = tmp_path / "many"
    for number in range(3):
        part = frame.iloc[40 * number : 40 * number + 40]
        folder.mkdir(exist_ok=True)
        part.to_parquet(folder / f"{number}.parquet")
    (folder / "_SUCCESS").touch()
    for url in (str(folder), str(folder / "*.parquet")):
        assert list(read_all(url, tmp_path / "scratch")["y"]) == TABLE["y"]


def test_image_folders_are_classes(rng, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(20):
            data = image_bytes(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            (tmp_path / "pets" / name / f"{number}.png").write_bytes(data)
    config = make_config(data={"train": str(tmp_path / "pets")})
    prepared = dataset.prepare_dataset(config, str(tmp_path))
    assert prepared.task.target.classes == ("cat", "dog")
    images = [prepared.open(name)[0]["image"] for name in splits.NAMES]
    assert np.concatenate(images).shape == (40, 6, 6, 3)
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"?")
    with pytest.raises(UserError, match=r"dog/3\.png': .*not a PNG, JPEG"):
        dataset.prepare_dataset(config, str(tmp_path / "again"))


def test_a_large_row_group_is_split_into_blocks(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_GROUP_ROWS", 30)
    monkeypatch.setattr(sources, "GROUP_ROWS", 30)
    url = write(frame, "parquet", tmp_path)
    blocks = sources.open_source(sources.find_source(url), str(tmp_path / "scratch"))
    assert [block.num_rows for block in blocks] == [30] * 4
    assert [block.start for block in blocks] == [0, 30, 60, 90]
    assert blocks[2].place(61) == f"'{url}', row 61"
    assert list(read_all(url, tmp_path / "other")["y"]) == TABLE["y"]


def test_the_error_names_the_line_of_a_csv_with_an_extra_field(frame, tmp_path):
    path = tmp_path / "data.csv"
    frame[["n", "y"]].to_csv(path, index=False)
    lines = path.read_text().splitlines()
    lines[17] += ",extra"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"data\.csv' cannot.*line 18 has 3 fields; expected 2"):
        sources.open_source(sources.find_source(str(path)), str(tmp_path / "scratch"))


def test_csv_in_another_encoding_needs_the_encoding_option(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes("c,y\nx,1\nmüde,2\n".encode("latin-1"))
    source = sources.find_source(str(path))
    with pytest.raises(
        UserError, match=r"line 3 is not utf-8 text; give the file's --data\.encoding"
    ):
        sources.open_source(source, str(tmp_path / "scratch"))
    (block,) = sources.open_source(source, str(tmp_path / "other"), CsvOptions("latin-1"))
    (batch,) = block.read(["c"])
    assert batch.column(0).to_pylist() == ["x", "müde"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("a,y\n", "no records"),
        ("a,a,y\n1,2,3\n", "'a' occurs twice"),
    ],
)
def test_the_error_names_a_csv_file_without_a_table(tmp_path, content, words):
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        sources.open_source(sources.find_source(str(path)), str(tmp_path / "scratch"))
    assert str(path) in str(caught.value)


def test_the_error_names_files_with_different_columns(frame, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    frame.to_parquet(folder / "0.parquet")
    frame.rename(columns={"c": "d"}).to_parquet(folder / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet' and .*different columns \(c, d\)"):
        dataset.prepare_dataset(table_config(str(folder)), str(tmp_path))


def test_column_names_are_case_sensitive_and_errors_give_a_hint(frame, tmp_path):
    frame["N"] = frame["n"] * 2
    url = write(frame, "csv", tmp_path)
    config = table_config(url).model_dump(exclude_unset=True)
    both = make_config(**{**config, "features": {"n": "number", "N": "number"}})
    inputs, _ = dataset.prepare_dataset(both, str(tmp_path)).open("train")
    np.testing.assert_allclose(inputs["numbers"][:, 0], inputs["numbers"][:, 1], rtol=1e-5)
    wrong = make_config(**{**config, "features": {"C": "category"}})
    with pytest.raises(UserError, match=r"no column 'C'; .*Did you mean 'c'"):
        dataset.prepare_dataset(wrong, str(tmp_path))


def test_bad_records_stop_the_run_or_are_dropped_and_counted(frame, tmp_path):
    frame["n"] = frame["n"].astype(object)
    frame.loc[[17, 60], "n"] = "broken"
    url = write(frame, "csv", tmp_path)
    with pytest.raises(UserError, match=r"data\.csv', row 17: field 'n' is 'broken'"):
        dataset.prepare_dataset(table_config(url), str(tmp_path))
    config = table_config(url, data={"bad_records": "drop"})
    prepared = dataset.prepare_dataset(config, str(tmp_path))
    assert sum(split["num_records"] for split in prepared.summary["splits"].values()) == 118
    assert prepared.summary["report"]["num_bad"] == 2
    assert [place for place, _ in prepared.summary["report"]["bad"]] == [
        f"'{url}', row 17",
        f"'{url}', row 60",
    ]
    seen = np.concatenate([prepared.open(name)[1] for name in splits.NAMES])
    target = prepared.task.target
    expected = sorted(set(range(120)) - {17, 60})
    np.testing.assert_allclose(sorted(seen * target.scale + target.mean), expected, atol=1e-3)


def test_a_batch_of_bad_records_only_is_dropped(frame, tmp_path):
    frame["n"] = frame["n"].astype(str)
    frame.loc[50:99, "n"] = "broken"
    for name, part in (("a", frame[:50]), ("b", frame[50:100]), ("c", frame[100:])):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    config = table_config(str(tmp_path / "*.csv"), data={"bad_records": "drop"})
    prepared = dataset.prepare_dataset(config, str(tmp_path))
    assert prepared.summary["report"]["num_bad"] == 50
    seen = np.concatenate([prepared.open(name)[1] for name in splits.NAMES])
    target = prepared.task.target
    expected = sorted(set(range(120)) - set(range(50, 100)))
    np.testing.assert_allclose(sorted(seen * target.scale + target.mean), expected, atol=1e-3)
    for name in splits.NAMES:
        inputs, targets = prepared.open(name)
        assert {len(array) for array in inputs.values()} == {len(targets)}


def test_json_lines_types_fit_the_whole_file(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"a": None, "b": 1},
        {"a": "2020-01-01", "b": 1.5, "c": [1, 2]},
        {"a": 7, "d": {"e": 1}},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_all(str(path), tmp_path / "scratch")
    assert found["a"] == [None, "2020-01-01", "7"]
    np.testing.assert_array_equal(found["b"], [1, 1.5, np.nan])
    assert found["c"] == [None, [1, 2], None]
    assert list(found["d.e"]) == [None, None, 1]
    path.write_text('[{"a": 1},\n{"a": 2}]')
    with pytest.raises(UserError, match="line 1 is not JSON: it may be one array"):
        read_all(str(path), tmp_path / "other")
    path.write_text('{"a": 1}\n{"a": }\n')
    with pytest.raises(UserError, match=r"data\.jsonl' cannot be read: line 2 is not JSON"):
        read_all(str(path), tmp_path / "other")


def test_whole_numbers_with_missing_values_keep_their_digits(tmp_path):
    path = tmp_path / "data.parquet"
    pa.parquet.write_table(pa.table({"id": [2**53 + 1, None]}), path)
    assert read_all(str(path), tmp_path / "scratch")["id"] == [2**53 + 1, None]


def test_empty_files_among_others_are_skipped(frame, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    frame.head(0).to_parquet(folder / "0.parquet")
    frame.to_parquet(folder / "1.parquet")
    assert list(read_all(str(folder), tmp_path / "scratch")["y"]) == TABLE["y"]
    assert list(sample_source(sources.find_source(str(folder)), 5)["y"]) == [0, 1, 2, 3, 4]
    frame.to_csv(folder / "2.csv")
    with pytest.raises(UserError, match=r"several formats \(csv, parquet\)"):
        sources.find_source(str(folder))


@pytest.mark.ray
def test_ray_data_and_threads_encode_the_same(frame, tmp_path, monkeypatch, ray_session):
    url = write(frame, "parquet", tmp_path)
    local = dataset.prepare_dataset(table_config(url), str(tmp_path / "local"))
    monkeypatch.setattr(preprocess, "LARGE_BYTES", 0)
    spread = dataset.prepare_dataset(table_config(url), str(tmp_path / "spread"))
    assert spread.summary == local.summary
    for name in splits.NAMES:
        for one, other in zip(local.open(name), spread.open(name), strict=True):
            np.testing.assert_equal(dict(enumerate([one])), dict(enumerate([other])))


@pytest.mark.ray
def test_errors_from_ray_data_name_the_bad_record(frame, tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(preprocess, "LARGE_BYTES", 0)
    monkeypatch.setattr(fitting, "FIT_RECORDS", 10)
    frame["c"] = frame["c"].map(lambda value: value or "")
    frame["n"] = frame["n"].fillna(0).astype(str)
    frame.loc[99, "n"] = "broken"
    with pytest.raises(UserError, match=r"row 99: field 'n' is 'broken'"):
        dataset.prepare_dataset(table_config(write(frame, "parquet", tmp_path)), str(tmp_path))


def codes(frame: pd.DataFrame, tmp_path: Path, **data: object) -> np.ndarray:
    url = write(frame, "parquet", tmp_path)
    blocks = sources.open_source(sources.find_source(url), str(tmp_path))
    config = table_config(url, data=data).data
    return splits.assign_splits(config, {"train": blocks}, list(frame.columns))[0].codes_N


def test_a_split_by_key_is_stable_and_keeps_keys_together(frame, tmp_path):
    frame["key"] = [f"customer {number // 3}" for number in range(120)]
    chosen = codes(frame, tmp_path, split_key="key", test_fraction=0.3, valid_fraction=0.2)
    assert set(chosen) == {0, 1, 2}
    for start in range(0, 120, 3):
        assert len(set(chosen[start : start + 3])) == 1
    more = pd.concat([frame, frame.assign(key="another")])
    again = codes(more, tmp_path / "more", split_key="key", test_fraction=0.3, valid_fraction=0.2)
    np.testing.assert_array_equal(again[:120], chosen)


def test_a_split_by_time_tests_on_the_latest(frame, tmp_path, rng):
    days = rng.permutation(120)
    frame["when"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(days, "D")
    chosen = codes(frame, tmp_path, split_time="when", test_fraction=0.25, valid_fraction=0.25)
    assert sorted(days[chosen == splits.TEST]) == list(range(90, 120))
    assert sorted(days[chosen == splits.VALID]) == list(range(60, 90))
    frame["when"] = frame["when"].dt.strftime("%d.%m.%Y")
    with pytest.raises(UserError, match=r"row 0: field 'when' is .*; expected a date"):
        codes(frame, tmp_path, split_time="when")
    kinds = {**KINDS, "when": {"kind": "date", "format": "%d.%m.%Y"}}
    url = write(frame, "parquet", tmp_path)
    config = table_config(url, features=kinds, data={"split_time": "when"})
    counts = dataset.prepare_dataset(config, str(tmp_path / "runs")).summary["splits"]
    assert counts["test"]["num_records"] == 24
    frame["when"] = days
    by_number = codes(frame, tmp_path, split_time="when", test_fraction=0.25, valid_fraction=0.25)
    np.testing.assert_array_equal(by_number, chosen)
    frame["when"] = frame["when"].astype(float)
    frame.loc[5, "when"] = None
    with pytest.raises(UserError, match="row 5: column 'when' is missing"):
        codes(frame, tmp_path, split_time="when")


def test_the_report_lists_missing_values_duplicates_and_leaks(tmp_path, rng):
    values = rng.normal(size=300)
    frame = pd.DataFrame(
        {
            "a": rng.normal(size=300),
            "leak": values * 3 + 1,
            "gaps": np.where(np.arange(300) % 4 == 0, np.nan, 1.0 + np.arange(300)),
            "y": values,
        }
    )
    frame = pd.concat([frame, frame.iloc[:30]])
    url = write(frame, "parquet", tmp_path)
    kinds = dict.fromkeys(("a", "leak", "gaps"), "number")
    config = make_config(data={"train": url}, features=kinds, target="y", task_type="regression")
    prepared = dataset.prepare_dataset(config, str(tmp_path))
    facts = prepared.summary["report"]
    assert list(facts["leakage_suspects"]) == ["leak"]
    assert facts["columns"]["gaps"]["missing"] == pytest.approx(0.25, abs=0.05)
    pairs = facts["duplicates"]
    digests = np.concatenate(
        [np.nan_to_num(prepared.open(name)[0]["numbers"]) for name in splits.NAMES]
    )
    assert len(digests) - len(np.unique(digests, axis=0)) == 30
    assert 0 < pairs["within train"] + pairs["valid in train"] + pairs["test in train"] <= 30
    text = (prepared.folder / "report.txt").read_text()
    for word in ("missing: gaps", "duplicates", "leakage? 'leak'"):
        assert word in text
    assert (prepared.folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_csv_line_breaks_and_quotes_are_read_as_by_python(tmp_path):
    path = tmp_path / "data.csv"
    rows = [["a\nb", 'c"d', "1"], ["e,f", "g", "2"]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["p", "q", "y"], *rows])
    assert json.dumps(read_all(str(path), tmp_path / "s")) == json.dumps(
        {name: [row[index] for row in rows] for index, name in enumerate("pqy")}
    )


class Runs:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("nested", ["plain", "list", "struct", "dictionary"])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "feather"])
def test_pickles_of_ray_data_in_a_file_are_refused_unread(tmp_path, kind, nested):
    ray_objects = pytest.importorskip("ray.data._internal.object_extensions.arrow")
    values = pa.ExtensionArray.from_storage(
        ray_objects.ArrowPythonObjectType(),
        pa.array([pickle.dumps(Runs(tmp_path / "ran"))] * 2, pa.large_binary()),
    )
    match nested:
        case "list":
            values = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), values)
        case "struct":
            values = pa.StructArray.from_arrays([values], ["inner"])
        case "dictionary":
            if kind == "parquet":
                pytest.skip("Parquet has no dictionary of extension values")
            values = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), values)
    table = pa.table({"label": ["a", "b"], "x": values})
    ending = "arrow" if kind == "stream" else kind
    path = tmp_path / f"data.{ending}"
    with path.open("wb") as file:
        match kind:
            case "parquet":
                pa.parquet.write_table(table, file)
            case "feather":
                pa.feather.write_feather(table, file)
            case _:
                new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
                with new(file, table.schema) as writer:
                    writer.write_table(table)
    source = sources.find_source(str(path))
    with pytest.raises(UserError, match="'x' has the extension type"):
        sample_source(source, 10)
    with pytest.raises(UserError, match="extension type"):  # noqa: PT012
        blocks = sources.open_source(source, str(tmp_path / "scratch"))
        for block in blocks:
            list(block.read(["label", "x"], 10))
    assert not (tmp_path / "ran").exists()


def test_extension_types_of_arrow_itself_are_read(tmp_path):
    uuids = pa.array([bytes(16)], pa.binary(16)).cast(pa.uuid())
    path = tmp_path / "data.parquet"
    pa.parquet.write_table(pa.table({"id": uuids}), path)
    with path.open("rb") as file:
        assert readers.open_parquet(file).read().num_rows == 1
