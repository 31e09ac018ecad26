"""Quality of the nets for tables and texts, compared with scikit-learn on the same splits.

`python tests/bench/quality.py --data FOLDER [--seeds 5]`

FOLDER contains tabular/{titanic,taxis}.csv and agnews/{train,test}.csv. Each seed gives another
80/20 split; agnews has a fixed test split, so there each seed gives another run. Training uses
`train.training` with the shipped configs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from cluster import connect
from train import cli
from train.training import train_bundle

CONFIGS = cli.CONFIGS


def boosting(train: pd.DataFrame, test: pd.DataFrame, target: str, columns: list[str]) -> float:
    """Return HistGradientBoosting's test score; dates become seconds and names categories."""

    def inputs(frame: pd.DataFrame) -> pd.DataFrame:
        ready = frame[columns].copy()
        for name in columns:
            if name in ("pickup", "dropoff"):
                ready[name] = pd.to_datetime(ready[name]).astype("int64") / 1e9
            elif not pd.api.types.is_numeric_dtype(ready[name]):
                known = pd.Index(sorted(train[name].dropna().astype(str).unique()))
                ready[name] = pd.Categorical(ready[name].astype(str), known[:250])
        if "pickup" in columns:  # our features include the difference of two dates
            ready["duration"] = ready["dropoff"] - ready["pickup"]
        return ready

    regression = train[target].nunique() > 10
    kind = HistGradientBoostingRegressor if regression else HistGradientBoostingClassifier
    model = kind(random_state=0, categorical_features="from_dtype")
    return float(model.fit(inputs(train), train[target]).score(inputs(test), test[target]))


def tfidf(train: pd.DataFrame, test: pd.DataFrame, target: str, columns: list[str]) -> float:
    def texts(frame: pd.DataFrame) -> pd.Series:
        return frame[columns].fillna("").agg(" ".join, axis=1)

    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    return float(model.fit(texts(train), train[target]).score(texts(test), test[target]))


def ours(name: str, train: pd.DataFrame, test: pd.DataFrame, seed: int, root: Path) -> float:
    """Return the metric of the fp32 net on the test split."""
    files = {part: root / f"{name}-{seed}-{part}.csv" for part in ("train", "test")}
    train.to_csv(files["train"], index=False)
    test.to_csv(files["test"], index=False)
    options = [
        *("--config", str(CONFIGS / f"{name}.yaml"), "--seed", str(seed)),
        *("--data.train", str(files["train"]), "--data.test", str(files["test"])),
        *("--storage.path", str(root), "--workers.num", "1"),
    ]
    bundle = train_bundle(cli.parse(options).config)
    return float(bundle.manifest.metrics[f"test_{bundle.task.metric}"])


def compare(
    name: str,
    splits: Callable[[int], tuple[pd.DataFrame, pd.DataFrame]],
    reference: Callable[[pd.DataFrame, pd.DataFrame, str, list[str]], float],
    seeds: int,
    root: Path,
) -> dict[str, object]:
    config = cli.parse(["--config", str(CONFIGS / f"{name}.yaml")]).config
    columns = list(config.features)
    rows = []
    started = time.perf_counter()
    for seed in range(seeds):
        train, test = splits(seed)
        rows.append(
            (ours(name, train, test, seed, root), reference(train, test, config.target, columns))
        )
    net, other = np.array(rows).T
    return {
        "net": round(float(net.mean()), 4),
        "net_std": round(float(net.std()), 4),
        "scikit_learn": round(float(other.mean()), 4),
        "scikit_learn_std": round(float(other.std()), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    connect.connect(num_cpus=2, metrics=False)

    def table(name: str) -> Callable[[int], tuple[pd.DataFrame, pd.DataFrame]]:
        frame = pd.read_csv(arguments.data / "tabular" / f"{name}.csv")
        return lambda seed: tuple(train_test_split(frame, test_size=0.2, random_state=seed))

    news = tuple(
        pd.read_csv(arguments.data / "agnews" / f"{part}.csv") for part in ("train", "test")
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, splits, reference in (
            ("titanic", table("titanic"), boosting),
            ("taxis", table("taxis"), boosting),
            ("agnews", lambda seed: news, tfidf),
        ):
            result = compare(name, splits, reference, arguments.seeds, root)
            print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    main()
