"""Offline inference: the same arrays as in training and over HTTP, and every row exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from cluster.errors import UserError
from serve.offline import __main__ as offline
from serve.offline.predictor import OfflinePredictor
from tests.server import REPOSITORY
from tests.serving import make_rest
from train.bundle import Bundle, Predictor
from train.config import validate_config
from train.data import dataset, splits
from train.data.reading import sources
from train.training import train_bundle
from train.values.ragged import pad
from train.values.records import concatenate

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COUNT = 1000
KINDS = {
    "age": "number",
    "member": "boolean",
    "joined": "date",
    "left": "date",
    "town": "category",
    "note": "text",
}


def make_table(count: int, rng: np.random.Generator) -> pd.DataFrame:
    def some(values: np.ndarray) -> pd.Series:
        series = pd.Series(values, dtype=object)
        series[rng.random(count) < 0.1] = None
        return series

    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 700, count), "D")
    age = rng.normal(40, 12, count).round(3)
    return pd.DataFrame(
        {
            "age": some(age),
            "member": some(rng.choice(["yes", "no"], count)),
            "joined": some(days.strftime("%Y-%m-%d").to_numpy()),
            "left": some((days + pd.Timedelta(days=3)).strftime("%Y-%m-%d %H:%M").to_numpy()),
            "town": some(rng.choice(["Ulm", "Köln", "São Paulo"], count)),
            "note": some(rng.choice(["all was well", "too late, again", "never more"], count)),
            "y": (age > 40).astype(int),
        }
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.csv"
    make_table(COUNT, np.random.default_rng(0)).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def config(table, tmp_path_factory):
    return validate_config(
        {
            "name": "table",
            "target": "y",
            "task_type": "classification",
            "features": KINDS,
            "data": {"train": str(table)},
            "precision": "fp32",
            "workers": {"num": 1},
            "optim": {"name": "adamw", "lr": 0.002, "epochs": 3, "batch_size": 64},
            "storage": {"path": str(tmp_path_factory.mktemp("runs"))},
        }
    )


@pytest.fixture(scope="module")
def table_bundle(config, ray_session) -> Bundle:
    return train_bundle(config)


class Recorder:
    """An engine that records its inputs."""

    def __init__(self, engine):
        self.engine, self.given = engine, []

    def run(self, inputs):
        self.given.append({name: np.array(array) for name, array in inputs.items()})
        return self.engine.run(inputs)

    def all(self):
        return concatenate(self.given)


@pytest.fixture
def recorded(table_bundle):
    predictor = Predictor.load(table_bundle)
    recorder = Recorder(predictor.engine)
    return replace(predictor, engine=recorder), recorder


@pytest.fixture(scope="module")
def in_training(config, table_bundle) -> dict[str, np.ndarray]:
    """The arrays that training read, in the order of the splits."""
    prepared = dataset.prepare_dataset(config, config.storage.path)
    return concatenate([pad(prepared.open(name)[0]) for name in splits.NAMES])


def assert_same_bytes(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Compare the records of arrays, in any order: texts are run in order of their length."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        assert array.shape == other[name].shape
    assert len(one["tokens"]) == COUNT
    records, others = (
        sorted(b"".join(array[row].tobytes() for array in each.values()) for row in range(COUNT))
        for each in (one, other)
    )
    assert records == others


def test_options_come_from_the_command_line_alone(monkeypatch):
    monkeypatch.setenv("MODEL", "models:/other/1")
    monkeypatch.setenv("WORKERS", "3")
    given = ["--model", "models:/table/1", "--input", "a.csv", "--output", "out"]
    options = offline.parse(given)
    assert (options.model, options.workers) == ("models:/table/1", None)


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_http_inputs_are_the_same_bytes_as_in_training(table, recorded, in_training, protocol):
    predictor, recorder = recorded
    app = make_rest(predictor.bundle, load=lambda _location: predictor)
    frame = pd.read_csv(table, dtype=object)
    frame["age"] = frame["age"].astype(float)

    def value(name, item):
        return None if pd.isna(item) else item

    columns = {name: [value(name, item) for item in frame[name]] for name in KINDS}
    if protocol == "v1":
        path = "/v1/models/table:predict"
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        body = {"instances": rows}
    else:
        path = "/v2/models/table/infer"
        datatypes = {"age": "FP64"}
        body = {
            "inputs": [
                {
                    "name": name,
                    "shape": [COUNT, 1],
                    "datatype": datatypes.get(name, "BYTES"),
                    "data": values,
                }
                for name, values in columns.items()
            ]
        }

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, json=body)

    import asyncio

    answer = asyncio.run(ask())
    assert answer.status_code == 200, answer.text
    assert_same_bytes(recorder.all(), in_training)


def test_offline_inputs_are_the_same_bytes_as_in_training(
    table, recorded, in_training, table_bundle, tmp_path
):
    predictor, recorder = recorded
    source = sources.find_source(str(table))
    blocks = sources.open_source(source, str(tmp_path / "scratch"))
    worker = OfflinePredictor(
        table_bundle.location, predictor.variant, "table/1", str(tmp_path / "out"), [], blocks
    )
    worker._predictor = predictor
    worker({"number": np.arange(len(blocks))})
    assert_same_bytes(recorder.all(), in_training)


def command(table_bundle: Bundle, source: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", table_bundle.location, "--input", str(source), "--output", str(output)]
    return [sys.executable, "-m", "serve.offline", *options, *more]


def run(*arguments, **options):
    return subprocess.run(
        *arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, **options
    )


def written(output: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted(output.glob("part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


def test_a_killed_run_continues_and_writes_each_row_once(table_bundle, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    frame = make_table(20_000, np.random.default_rng(1))
    frame["age"] = frame["age"].astype(float)
    frame.loc[123, "left"] = "soon"
    for number in range(20):
        part = frame.iloc[1000 * number : 1000 * number + 1000]
        part.to_parquet(folder / f"{number:02}.parquet")
    output = tmp_path / "out"
    arguments = command(table_bundle, folder, output, "--keep", '["town"]', "--workers", "1")
    process = subprocess.Popen(
        arguments, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("part-*.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(list(output.glob("part-*.parquet")))
    done = run(arguments, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["rows"], summary["bad"]) == (19_999, 1)
    assert summary["rows_this_time"] <= 1000 * (20 - before)
    answers = written(output)
    assert sorted(answers["row"]) == sorted(set(range(20_000)) - {123})
    assert answers["town"].fillna("").tolist() == frame["town"].drop(123).fillna("").tolist()
    assert set(answers["model"]) == {"table/1"}
    (bad,) = [pd.read_parquet(path) for path in (output / "_bad").iterdir()]
    assert bad["place"].tolist() == [f"'{folder}/00.parquet', row 123"]
    assert "field 'left' is 'soon'" in bad["reason"][0]
    assert json.loads(bad["record"][0])["left"] == "soon"
    predictor = Predictor.load(table_bundle)
    records = frame.drop(123)[list(KINDS)].to_dict("records")[:500]
    expected = predictor.predict(records)
    assert answers["label"].tolist()[:500] == expected["label"].tolist()
    found = np.stack(answers["probabilities"][:500])
    np.testing.assert_allclose(found, expected["probabilities"], atol=1e-6)
    again = run(arguments, check=False)
    assert json.loads(again.stdout.splitlines()[-1])["rows_this_time"] == 0


def test_a_misspelt_or_refused_column_ends_the_run_at_once(table, table_bundle, tmp_path):
    path = tmp_path / "other.csv"
    pd.read_csv(table).rename(columns={"town": "Town"}).to_csv(path, index=False)
    arguments = command(table_bundle, path, tmp_path / "out")[3:]
    with pytest.raises(UserError, match="has no 'town', but has 'Town'"):
        offline.main(arguments)
    arguments = [*command(table_bundle, table, tmp_path / "out")[3:], "--unknown-fields", "refuse"]
    with pytest.raises(UserError, match="has the unknown field 'y'"):
        offline.main(arguments)


def test_a_column_with_gaps_in_training_may_be_left_out(table, table_bundle, tmp_path):
    frame = pd.read_csv(table).head(50)
    path = tmp_path / "other.csv"
    frame.drop(columns="town").to_csv(path, index=False)
    offline.main(command(table_bundle, path, tmp_path / "out")[3:])
    answers = pd.read_parquet(tmp_path / "out").sort_values("row")
    records = frame[list(KINDS)].assign(town=None).to_dict("records")
    expected = Predictor.load(table_bundle).predict(records)
    assert answers["label"].tolist() == expected["label"].tolist()


def test_a_run_on_csv_can_be_repeated_and_adds_no_column(table, table_bundle, tmp_path):
    source, output = tmp_path / "rows.csv", tmp_path / "out"
    frame = pd.read_csv(table).head(40)
    frame["left"] = "soon"  # every record is bad
    frame.to_csv(source, index=False)
    for _ in range(2):
        summary = offline.main(command(table_bundle, source, output)[3:])
        assert (summary["rows"], summary["bad"]) == (0, 40)
    assert len(pd.read_parquet(output)) == 0, "readers of folders must skip the other files"
    assert {path.name for path in output.iterdir()} == {
        "part-000000.parquet",
        "_bad",
        "_plan.json",
        "_summary.json",
    }
    arguments = command(table_bundle, source, tmp_path / "other", "--keep", '["label"]')
    with pytest.raises(UserError, match="--keep has 'label'"):
        offline.main(arguments[3:])


def test_an_output_of_another_input_is_refused(table, table_bundle, tmp_path):
    other = tmp_path / "other.csv"
    pd.read_csv(table).head(50).to_csv(other, index=False)
    output = tmp_path / "out"
    offline.main(command(table_bundle, other, output)[3:])
    with pytest.raises(UserError, match="started with another input"):
        offline.main(command(table_bundle, table, output)[3:])
