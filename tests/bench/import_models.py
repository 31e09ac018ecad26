"""Imported models against their own libraries: predictions, seconds of the import, requests/s.

    .venv/bin/python tests/bench/import_models.py --table titanic.csv --target survived

Trains a model of each format on half of the table, imports it with the other half, and compares all
predictions. Then Halyard and the library behind FastAPI, with two workers each, take turns in
serving requests with one record from 16 connections.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import httpx
import joblib
import lightgbm
import numpy as np
import pandas as pd
import skl2onnx
import xgboost
from skl2onnx.common.data_types import FloatTensorType
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from tests import server
from tests.bench.peers import processes
from train.bundle import Bundle, Predictor

CONNECTIONS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = pd.read_csv(options.table)
    train, sample = table[::2], table[1::2]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, kind, path, wanted, rows in make_models(train, sample, options.target, folder):
            measured = imported(name, path, wanted, rows, options.target, folder)
            measured |= served(
                name, kind, path, rows.drop(columns=[options.target]), options, folder
            )
            print(json.dumps(measured), flush=True)


def make_models(train: pd.DataFrame, sample: pd.DataFrame, target: str, folder: Path) -> Any:
    """Yield name, kind, file, probabilities [N, K] and sample of each model."""
    features, labels = train.drop(columns=[target]), train[target]
    numbers = [name for name in features if features[name].dtype.kind in "fi"]
    texts = [name for name in features if features[name].dtype.kind not in "fib"]
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), numbers),
            ("texts", OneHotEncoder(handle_unknown="ignore"), texts),
        ]
    )
    for name, model in (
        ("logistic", LogisticRegression(max_iter=500)),
        ("forest", RandomForestClassifier(100, random_state=0)),
        ("histogram", HistGradientBoostingClassifier()),
        ("pipeline-xgboost", xgboost.XGBClassifier(n_estimators=100)),
        ("pipeline-lightgbm", lightgbm.LGBMClassifier(n_estimators=100, verbose=-1)),
    ):
        dense = columns.set_params(sparse_threshold=0)
        pipeline = Pipeline([("columns", dense), ("model", model)]).fit(features, labels)
        path = folder / f"{name}.joblib"
        joblib.dump(pipeline, path)
        wanted = pipeline.predict_proba(sample.drop(columns=[target]))
        yield name, "sklearn", path, wanted, sample
    only = sample[[*numbers, target]]
    trees = xgboost.XGBClassifier(n_estimators=100).fit(features[numbers], labels)
    trees.save_model(folder / "model.ubj")
    yield "xgboost", "xgboost", folder / "model.ubj", trees.predict_proba(only[numbers]), only
    boosted = lightgbm.LGBMClassifier(n_estimators=100, verbose=-1).fit(features[numbers], labels)
    boosted.booster_.save_model(folder / "model.txt")
    yield "lightgbm", "lightgbm", folder / "model.txt", boosted.predict_proba(only[numbers]), only
    linear = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression())
    linear.fit(features[numbers].to_numpy(), labels)
    shape = [("features", FloatTensorType([None, len(numbers)]))]
    graph = skl2onnx.to_onnx(linear, initial_types=shape, options={id(linear): {"zipmap": False}})
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    wanted = linear.predict_proba(only[numbers].to_numpy())
    yield "onnx", "onnx", folder / "model.onnx", wanted, only


def imported(
    name: str, path: Path, wanted: np.ndarray, sample: pd.DataFrame, target: str, folder: Path
) -> dict[str, Any]:
    """Import a model and compare its predictions for records of the sample."""
    sample.to_csv(folder / "sample.csv", index=False)
    command = [sys.executable, "-m", "train.bundle", "import", str(path), "--allow-pickle"]
    command += ["--name", name, "--data", str(folder / "sample.csv"), "--target", target]
    command += ["--storage.path", str(folder / "runs")]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    bundle = Bundle.load(json.loads(done.stdout.splitlines()[-1])["bundle"])
    rows = sample.drop(columns=[target]).astype(object)
    found = Predictor.load(bundle).predict(rows.where(rows.notna(), None).to_dict("records"))
    ours = found["probabilities"].argmax(axis=1)
    return {
        "model": name,
        "records": len(sample),
        "labels_differ": int(np.sum(ours != wanted.argmax(axis=1))),
        "largest_difference": float(np.abs(found["probabilities"] - wanted).max()),
        "import_s": round(seconds, 1),
    }


def served(
    name: str, kind: str, path: Path, rows: pd.DataFrame, options: Any, folder: Path
) -> dict[str, Any]:
    """Return requests/s and p99 of both servers, as medians over rounds in turn."""
    files = []
    # Without missing values, which a service would have to convert for the library.
    complete = rows.dropna().head(50).astype(object)
    for place, record in enumerate(complete.to_dict("records")):
        file = folder / f"body{place}.json"
        file.write_text(json.dumps({"instances": [record]}, default=lambda value: value.item()))
        files += ["--body", str(file)]
    load = [sys.executable, "-m", "serve.loadtest", server.URL, "--path"]
    load += [f"/v1/models/{name}:predict", "--connections", str(CONNECTIONS), *files]
    load += ["--duration", str(options.seconds), "--content-type", "application/json"]
    found: dict[str, list[dict[str, Any]]] = {"halyard": [], "fastapi": []}
    for _ in range(options.rounds):
        for which, each in found.items():
            mark = uuid.uuid4().hex
            environment = {**os.environ, processes.NAME: mark, "MODEL": str(path), "KIND": kind}
            start = start_halyard if which == "halyard" else start_fastapi
            process = start(name, folder, environment)
            try:
                done = subprocess.run(
                    load, capture_output=True, text=True, cwd=REPOSITORY, check=True
                )
                each.append(json.loads(done.stdout.splitlines()[-1]))
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(server.STOP_S)
                processes.kill(mark)
    return {
        f"{which}_{key}": float(np.median([value(each) for each in loads]))
        for which, loads in found.items()
        for key, value in (
            ("per_s", lambda each: each["ok_per_s"]),
            ("p99_ms", lambda each: each["latency_ms"]["p99"]),
        )
    }


def start_halyard(name: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    arguments = [f"model=models:/{name}@production", f"storage={folder / 'runs'}", "replicas=2"]
    return server.start(*arguments, log=folder / "serve.log", environment=environment)


def start_fastapi(name: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", "tests.bench.peers.library_server:app"]
    command += ["--workers", "2", "--port", "8000", "--log-level", "warning"]
    # Otherwise the workers' libraries compete for the cores with several threads each.
    threads = {"OMP_NUM_THREADS": "1"}
    with (folder / "peer.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment | threads, stdout=log, stderr=log, cwd=REPOSITORY
        )
    while process.poll() is None:
        try:
            if httpx.get(f"{server.URL}/v2/health/ready").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError((folder / "peer.log").read_text()[-2000:])


if __name__ == "__main__":
    main()
