"""Inference of column kinds, task type and options from a user's file."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from cluster.errors import UserError
from tests.conftest import run_main
from tests.train.tasks.test_tasks import image_bytes
from train import cli
from train.config import validate_config
from train.data.schema import inference
from train.data.schema.columns import infer_column
from train.data.schema.target_type import infer_task_type


@pytest.fixture
def passengers(rng) -> pd.DataFrame:
    count = 400
    return pd.DataFrame(
        {
            "id": np.arange(count) + 1000,
            "age": np.where(rng.random(count) < 0.2, np.nan, rng.integers(1, 80, count)),
            "sex": rng.choice(["male", "female"], count),
            "alone": rng.choice([True, False], count),
            "boarded": pd.Timestamp("1912-04-10") + pd.to_timedelta(rng.random(count), "D"),
            "born": [f"{day:02}.03.1890" for day in rng.integers(1, 29, count)],
            "ticket": [f"T{number}" for number in range(count)],
            "code": [f"{number:04}" for number in rng.integers(0, 50, count)],
            "remark": [
                " ".join(rng.choice(["sea", "ship", "ice", "cold", "night", "boat"], 6))
                for _ in range(count)
            ],
            "always": "x",
            "never": None,
            "survived": rng.integers(0, 2, count),
            "fare": rng.gamma(2, 15, count),
        }
    )


EXPECTED = {
    "age": "number",
    "sex": "category",
    "alone": "boolean",
    "boarded": "date",
    "born": "date",
    "code": "category",
    "remark": "text",
    "fare": "number",
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_kinds_of_columns_are_inferred(passengers, tmp_path, capsys, kind):
    path = tmp_path / f"data.{kind}"
    passengers.to_csv(path, index=False) if kind == "csv" else passengers.to_parquet(path)
    config = validate_config({"name": "a", "target": "survived", "data": {"train": str(path)}})
    complete = inference.complete_config(config).config
    assert {name: column.kind for name, column in complete.features.items()} == EXPECTED
    assert complete.features["born"].format == "%d.%m.%Y"
    assert complete.task_type == "classification"
    assert complete.optim.name == "adamw"
    told = capsys.readouterr().err
    for words in ("counts the records", "different names of 400", "missing in all of 400"):
        assert words in told


def test_given_options_are_not_overridden(passengers, tmp_path):
    path = tmp_path / "data.csv"
    passengers.to_csv(path, index=False)
    given = {
        "name": "a",
        "target": "fare",
        "data": {"train": str(path), "drop": ["survived", "age"]},
        "optim": {"lr": 0.5},
        "precision": "bf16",
    }
    complete = inference.complete_config(validate_config(given)).config
    assert complete.task_type == "regression"
    assert complete.optim.lr == 0.5
    assert complete.precision == "bf16"
    assert not {"survived", "age", "fare"} & set(complete.features)
    assert inference.complete_config(complete).config == complete


def test_the_task_type_is_inferred_from_the_target():
    assert infer_task_type(["a", "b", "a"])[0] == "classification"
    assert infer_task_type([0, 1] * 30)[0] == "classification"
    assert infer_task_type(["0.5", "1.25", "3"] * 5)[0] == "regression"
    assert infer_task_type(np.arange(200.0))[0] == "regression"
    assert infer_task_type([["a"], [], ["b", "a"]])[0] == "multilabel"
    with pytest.raises(UserError, match="missing in every record"):
        infer_task_type([None, None])


def test_image_bytes_and_image_structs_are_images(rng):
    data = image_bytes(rng.integers(0, 256, (4, 4), dtype=np.uint8))
    assert infer_column("a", [data, None]).kind == "image"
    assert infer_column("a", [{"bytes": data, "path": None}]).kind == "image"
    assert infer_column("a", [b"other"]).kind is None


def test_a_file_without_usable_columns_is_refused_with_reasons(tmp_path):
    path = tmp_path / "data.csv"
    pd.DataFrame({"a": ["x"] * 30, "y": [0, 1] * 15}).to_csv(path, index=False)
    config = validate_config({"name": "a", "target": "y", "data": {"train": str(path)}})
    with pytest.raises(UserError, match="from: a: the same in all of 30 records"):
        inference.complete_config(config)


def test_a_data_file_and_a_target_need_no_config(tmp_path):
    arguments = ["--data.train", "some/My Table.csv", "--target", "y", "--save-config", "a.yaml"]
    parsed, save_to = cli.parse(arguments)
    assert save_to == Path("a.yaml")
    assert parsed.name == "my-table"
    assert not parsed.features
    path = tmp_path / "saved.yaml"
    cli.save_config(parsed, path)
    assert validate_config(yaml.safe_load(path.read_text())) == parsed


@pytest.mark.ray
@pytest.mark.slow
def test_the_saved_config_repeats_the_run_of_a_table(passengers, tmp_path):
    passengers["survived"] = passengers["sex"] == "female"
    path, saved = tmp_path / "table.csv", tmp_path / "saved.yaml"
    passengers.to_csv(path, index=False)
    options = ["--storage.path", str(tmp_path / "runs")]
    first = run_main(
        [
            *("--data.train", str(path), "--target", "survived"),
            *("--save-config", str(saved), *options),
        ]
    )
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    assert result["model"] == "table"
    assert result["metrics"]["test_accuracy"] > 0.9
    assert {
        name: each["kind"] for name, each in yaml.safe_load(saved.read_text())["features"].items()
    } == EXPECTED
    report = tmp_path / "runs" / "bundles" / result["bundle"].rpartition("/")[2] / "report"
    assert {"data.txt", "data.png", "confusion.png"} <= {file.name for file in report.iterdir()}
    again = run_main(["--config", str(saved), *options])
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["metrics"] == result["metrics"]
