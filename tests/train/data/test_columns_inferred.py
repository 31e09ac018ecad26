"""Inferred kinds of columns (numbers, ids, codes, dates, sets), and samples of whole files."""

import json
import runpy
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray

from cluster.errors import UserError
from tests.server import REPOSITORY
from tests.train.tasks.test_pictures import saved
from train.config import validate_config
from train.data import dataset
from train.data.reading import sources
from train.data.reading.csv_files import find_delimiter
from train.data.reading.samples import sample_source
from train.data.schema import inference
from train.data.schema.columns import infer_column
from train.data.schema.styles import infer_style
from train.data.schema.target_type import infer_task_type
from train.stats import codes_beat_ranges

COUNT = 2_000


def kind_of(column, values, targets_N=None, **columns):
    style = infer_style({column: values, **columns})
    return infer_column(column, values, style=style, targets_N=targets_N)


@pytest.mark.parametrize(
    "column", ["user_id", "userId", "zip", "area code", "PULocationID", "item"]
)
def test_whole_numbers_are_codes_if_the_column_name_says_so(rng, column):
    assert kind_of(column, rng.integers(100, 300, COUNT)).kind == "category"
    assert kind_of(column, rng.permutation(9 * COUNT)[:COUNT]).kind is None


@pytest.mark.parametrize("column", ["age", "identity", "decode", "paid", "items", "zipf", "amount"])
def test_whole_numbers_under_other_names_stay_numbers(rng, column):
    assert kind_of(column, rng.integers(18, 90, COUNT)).kind == "number"


def test_ids_are_dropped_and_amounts_are_kept(rng):
    ids = rng.permutation(50_000)[:COUNT] + 100_000
    assert "all differ and are dense or evenly spread" in kind_of("x", ids).why
    assert kind_of("x", ids).kind is None
    assert kind_of("x", np.arange(COUNT)[::-1] * 7).kind is None
    assert kind_of("x", [2**60 + 3 * int(each) for each in ids]).kind is None
    repeated = [2**60 + int(each) for each in rng.integers(0, 50, COUNT)]
    assert kind_of("x", repeated).kind == "category"
    areas = rng.permutation(3_000)[:60] + 600
    assert kind_of("x", areas).kind == "number"
    assert kind_of("x", rng.permutation(100)[:60]).kind is None
    incomes = np.unique(rng.lognormal(10, 1, 4 * COUNT).astype(int))
    assert kind_of("x", rng.permutation(incomes)[:COUNT]).kind == "number"


def test_the_target_decides_between_codes_and_numbers(rng):
    codes = rng.integers(0, 80, 4 * COUNT)
    noise = rng.normal(size=len(codes))
    by_code = rng.normal(size=80)[codes] * 2 + noise
    by_size = codes / 20 + noise
    assert codes_beat_ranges(codes, by_code) > 10
    assert codes_beat_ranges(codes, by_size) < 1
    assert codes_beat_ranges(codes, noise) < 1
    assert kind_of("x", codes, by_code).kind == "category"
    assert kind_of("x", codes, by_size).kind == "number"
    assert kind_of("x", codes, noise).kind == "number"


def test_other_columns_resolve_ambiguous_formats():
    prices, sizes = ["1.234", "2.500"] * 20, ["3,5", "4,25"] * 20
    assert kind_of("price", prices).options == {}
    german = kind_of("price", prices, size=sizes)
    assert german.options == {"decimal": ","}
    in_doubt = ["1,234", "2,500"] * 20
    assert "--data.decimal" in kind_of("price", in_doubt).why
    dates = ["03/04/2024", "05/06/2024"] * 20
    assert kind_of("day", dates).options == {"format": "%m/%d/%Y"}
    assert kind_of("day", dates, other=["13/04/2024", "05/06/2024"]).options == {
        "format": "%d/%m/%Y"
    }


def test_number_lists_are_vectors_and_label_lists_are_sets():
    assert kind_of("x", [[1, 2], [1.5, 2.5], None]).kind == "vector"
    assert kind_of("x", [[1, 2], [1]]).kind is None
    assert kind_of("x", [["a"], [], ["b", "a"]]).kind == "set"
    tags = ["sport", "money", "sport;money", "food;sport"] * 20
    assert kind_of("x", tags).kind == "set"
    assert infer_task_type(tags)[0] == "multilabel"
    names = [f"{last}, {first}" for last in "ABCDEFGH" for first in "STUVWXYZ"]
    assert infer_task_type(names)[0] == "classification"
    assert kind_of("phone", [f"+49 {number}" for number in range(10**6, 10**6 + 99)]).kind is None


def test_whole_number_targets_name_the_task_type_option(rng):
    for values, taken, option in (
        (rng.integers(1, 6, 500), "classification", "--task_type regression"),
        (rng.integers(0, 500, 900), "regression", "--task_type classification"),
    ):
        task_type, why = infer_task_type(values)
        assert task_type == taken
        assert option in why


def test_the_sample_includes_values_far_into_the_file(tmp_path):
    path = tmp_path / "data.csv"
    frame = pd.DataFrame(
        {"x": np.arange(12_000) * 0.5, "late": None, "one": "a", "y": [0, 1] * 6_000}
    )
    frame = frame.astype({"x": object})
    frame.loc[11_000, "x"] = "unknown"
    frame.loc[11_500:, "late"] = "b"
    frame.loc[11_900, "one"] = "c"
    frame.to_csv(path, index=False)
    found = sample_source(sources.find_source(str(path)), 10_000)
    assert "unknown" in found["x"]
    assert {"b", None} == set(found["late"])
    assert {"a", "c"} == set(found["one"])
    assert len(found["y"]) < 10_200


@pytest.mark.parametrize(
    ("start", "delimiter"),
    [
        ('name;"a,b,c,d";y\n01234;1;1\n', ";"),
        ('"Zip\ncode",name,y\n01234,a,1\n', ","),
        ("a|b\n1|2\n", "|"),
        ("a\tb\n1,5\t2,5\n", "\t"),
        ("a;b\n1,5;2,5\n", ";"),
        ("alone\n1\n", ","),
    ],
)
def test_the_delimiter_splits_header_and_rows_equally(start, delimiter):
    assert find_delimiter(start) == delimiter


def test_headers_lose_line_breaks_and_spaces(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('"Zip\ncode", city ,y \n' + "01234,a,1\n02345,b,0\n" * 30)
    found = sample_source(sources.find_source(str(path)), 100)
    assert list(found) == ["Zip code", "city", "y"]
    config = {"name": "x", "target": "y ", "data": {"train": str(path)}}
    complete = inference.complete_config(validate_config(config)).config
    assert complete.target == "y"
    assert complete.features["Zip code"].kind == "category"


def test_the_report_notes_sentinels_and_similar_spellings(rng, tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "user": {"age": -999 if number % 20 == 0 else 20 + number % 50},
            "city": ("Köln", "Ko\u0308ln", "Rom ", "Rom")[number % 4],
            "x": rng.normal(),
            "y": "yes " if number % 3 else "no",
        }
        for number in range(600)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = {"name": "x", "target": "y", "data": {"train": str(path)}}
    config = inference.complete_config(validate_config(given)).config
    data = dataset.prepare_dataset(config, str(tmp_path / "runs"))
    notes = " ".join(data.summary["report"]["notes"])
    assert "'user.age'" in notes
    assert "are -999 and count as missing" in notes
    assert "'city': values that differ only in spaces" in notes
    assert data.summary["report"]["columns"]["user.age"]["missing"] == pytest.approx(0.05, abs=0.02)
    assert data.nullable == ["user.age"]
    assert data.task.target.classes == ("no", "yes")


def test_split_folders_are_not_read_as_classes(tmp_path, rng):
    from PIL import Image

    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                (folder / f"{number}.png").write_bytes(saved(Image.fromarray(pixels)))
    (tmp_path / "pets" / "train" / "cat" / "notes.md").write_text("none")
    config = validate_config({"name": "x", "data": {"train": str(tmp_path / "pets")}})
    config = inference.complete_config(config).config
    data = dataset.prepare_dataset(config, str(tmp_path / "runs"))
    assert data.task.target.classes == ("cat", "dog")
    counts = {name: split["num_records"] for name, split in data.summary["splits"].items()}
    assert counts == {"train": 24, "valid": 8, "test": 8}
    notes = " ".join(data.summary["report"]["notes"])
    assert "notes.md" in notes
    assert (
        "images 'image': 8×8 to 8×8 pixels, 24 of 24 in colour; all are converted to 8×8" in notes
    )


def test_a_table_of_eight_rows_is_refused(tmp_path):
    path = tmp_path / "data.csv"
    pd.DataFrame({"x": np.arange(8.0) ** 2, "y": [0, 1] * 4}).to_csv(path, index=False)
    config = validate_config({"name": "x", "target": "y", "data": {"train": str(path)}})
    config = inference.complete_config(config).config
    with pytest.raises(UserError, match="has 8 records; at least 20 are needed"):
        dataset.prepare_dataset(config, str(tmp_path / "runs"))


def test_a_line_that_names_the_separator_is_not_the_header(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("\ufeffsep=;\n\na;y\n" + "1,5;x\n2,5;z\n" * 20, encoding="utf-8")
    found = sample_source(sources.find_source(str(path)), 100)
    assert found["a"][:2] == ["1,5", "2,5"]
    path.write_text("sep=;\na;y\n1;2\n1;2;3\n")
    with pytest.raises(UserError, match="line 4 has 3 fields"):
        sample_source(sources.find_source(str(path)), 100)


def test_the_report_names_numbers_with_several_spellings(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("version,y\n" + "1.1,a\n1.10,b\n2.0,a\n" * 40)
    given = {"name": "x", "target": "y", "data": {"train": str(path)}}
    config = inference.complete_config(validate_config(given)).config
    data = dataset.prepare_dataset(config, str(tmp_path / "runs"))
    (note,) = (note for note in data.summary["report"]["notes"] if "version" in note)
    assert "'1.1' and '1.10'" in note


@pytest.mark.parametrize("script", ["train/main.py", "tune/main.py"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "prize"], ["prize", "Did you mean 'price'"]),
        (["--target", "price", "--data.drop", "[sise]"], ["sise", "Did you mean 'size'"]),
        (["--target", "price", "--data.train", "{folder}/home.csv"], ["home.csv"]),
    ],
)
def test_a_misspelt_name_is_reported_before_ray_starts(
    script, options, words, tmp_path, monkeypatch
):
    path = tmp_path / "homes.csv"
    path.write_text("size,price\n" + "1,2\n" * 30)
    options = [each.format(folder=tmp_path) for each in ("--data.train", str(path), *options)]
    monkeypatch.setattr(sys, "path", [*sys.path])
    main = runpy.run_path(str(REPOSITORY / script))["main"]
    with pytest.raises(UserError) as error:
        main([*options, "--storage.path", str(tmp_path)])
    assert not ray.is_initialized()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["X", None] * 50, "category"),
        (["1", ""] * 50, "category"),
        ([True, None] * 50, "boolean"),
        (["X"] * 99 + [None] * 200, "category"),
        (["X", *[None] * 299], None),
        (["F", "N"] * 50, "category"),
        (["Y", "N"] * 50, "boolean"),
        (['[{"a": 1}]', '[{"a": 2}, {"b": 1}]'] * 50, "category"),
        (["[1, [2, 3]]", "plain, b"] * 50, "category"),
    ],
)
def test_flags_and_nested_lists_get_the_expected_kind(values, kind):
    assert infer_column("c", values).kind == kind


def test_a_constant_column_reports_its_record_count():
    assert infer_column("c", ["a", "a"]).why == "the same in all of 2 records"
    why = infer_column("c", ["a"] * 299 + [None]).why
    assert why == "the same in all of 299 records; missing in 1"


@pytest.mark.parametrize("name", ["visits_per_user", "salesPerStore", "num_client", "avg item"])
def test_amounts_per_user_or_store_are_numbers(name, rng):
    values = rng.integers(0, 60, 400).tolist()
    assert infer_column(name, values).kind == "number"
    assert infer_column(name.split("_")[-1] if "_" in name else "user", values).kind != "number"


@pytest.mark.parametrize(
    "texts",
    [
        ["1", "1,3", "1,7", "2", "2,3", "2,7", "3"],
        ["500", "1,500", "2,000", "10,500"],
        ["12,5", "13", "-1,5", "8"],
    ],
)
def test_numbers_with_commas_are_not_label_lists(texts):
    assert infer_task_type(texts * 40)[0] in ("regression", "classification")


def test_the_sample_of_arrow_text_types_includes_late_values(tmp_path):
    texts = ["1"] * 90 + ["many"]
    for number, kind in enumerate((pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pa.table({"c": pa.array(texts).cast(kind)}), path)
        assert "many" in sample_source(sources.find_source(str(path)), 50)["c"]
