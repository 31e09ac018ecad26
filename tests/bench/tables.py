"""python -m tests.bench.tables FOLDER --results FILE: nets against simple models on many tables.

FOLDER contains files NAME.TARGET.csv. For each, a model is trained in its own process with only
`--data.train F --target C`, once for each of `--seeds` splits (`--large-seeds` if it has more than
10,000 records). Rows that FILE already contains are not computed again. The reference is the better
of the simple models that every run fits, by validation loss. The last line on stdout is a JSON
object. For each table it has the mean paired difference of net and default variant from the simple
model, with its 95 % interval over splits; the calibration error without and with temperature; and,
for two classes, the cost on the test split with the thresholds of a decision rule and with 0.5. In
that cost, missing the rarer class weighs more by the ratio of the class counts.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.server import REPOSITORY
from train.bundle import Bundle, Predictor
from train.bundle.engines import run_batches
from train.config import Config, DecisionRule
from train.data import dataset
from train.decision import fit_thresholds
from train.tasks import ClassTarget

# Student's t at 0.975 by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
METRICS = ("test_loss", "test_auc", "test_average_precision", "test_r2", "test_accuracy")
MANY_RECORDS = 10_000


def measure(path: Path, target: str, seed: int) -> dict[str, Any]:
    """Train on one split of a table; return the figures of its bundle."""
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        command = [
            *(sys.executable, "train/main.py", "--data.train", str(path), "--target", target),
            *("--name", path.name.split(".")[0].lower(), "--data.split_seed", str(seed)),
            *("--storage", root, "--registry.enabled", "false"),
        ]
        files = Path(root, "stdout"), Path(root, "stderr")
        with files[0].open("wb") as stdout, files[1].open("wb") as stderr:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = round(time.monotonic() - began, 1)
        output, errors = (file.read_text() for file in files)
        if status:
            return {"failed": errors.strip().splitlines()[-2:]}
        result = json.loads(output.splitlines()[-1])
        bundle = Bundle.load(result["bundle"])
        return {
            "seconds": seconds,
            "peak_mib": round(usage.ru_maxrss / 1024),
            "net": result["metrics"],
            "default": result["variants"][result["default_variant"]],
            "default_variant": result["default_variant"],
            "simple": next(iter(result["simple_models"].values())),
            "simple_name": next(iter(result["simple_models"])),
            "simple_seconds": [each.seconds for each in bundle.manifest.simple_models],
            "comparison": result["comparison"],
            **answers(bundle, root),
        }


def answers(bundle: Bundle, root: str) -> dict[str, Any]:
    """Return calibration and costs of a bundle's fp32 variant; empty without classes."""
    task = bundle.task
    if not isinstance(task.target, ClassTarget):
        return {}
    config = Config.model_validate(bundle.manifest.config)
    with redirect_stderr(io.StringIO()):
        data = dataset.prepare_dataset(config, root, None)
    engine = Predictor.load(bundle, "fp32").engine
    valid, test = (run_batches(engine.run, data.open(split)[0]) for split in ("valid", "test"))
    truths_N = data.open("test")[1]
    before, after = (
        task.calibrated(temperature).metrics(test, truths_N, "test")
        for temperature in (1.0, task.target.temperature)
    )
    found = {
        "temperature": task.target.temperature,
        "calibration_error": [each["test_calibration_error"] for each in (before, after)],
        "log_loss": [each["test_loss"] for each in (before, after)],
    }
    if len(task.target.classes) == 2:
        rarer, counts = task.target.rarest, task.target.counts
        ratio = round(max(counts) / min(counts), 1)
        costs = [[0.0, ratio], [ratio, 0.0]]
        costs[1 - rarer][rarer] = 1.0
        rule = DecisionRule(cost=tuple(map(tuple, costs)))
        thresholds = fit_thresholds(task, rule, valid, data.open("valid")[1])
        with_costs = replace(task.target, costs=rule.cost)
        found["cost"] = [
            replace(with_costs, thresholds=each).metrics(test, truths_N)["cost"]
            for each in ((0.5,), thresholds)
        ]
        found["cost_ratio"], found["threshold"] = ratio, thresholds[0]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the differences of net and default variant from the simple model, by metric."""
    found: dict[str, Any] = {"splits": len(rows)}
    for metric in METRICS:
        if metric not in rows[0]["simple"]:
            continue
        for which in ("net", "default"):
            differences = np.array([row[which][metric] - row["simple"][metric] for row in rows])
            mean = float(differences.mean())
            half = 0.0
            if len(rows) > 1:
                half = T_975[len(rows) - 1] * float(differences.std(ddof=1)) / len(rows) ** 0.5
            found[f"{which} {metric}"] = [
                round(each, 4) for each in (mean, mean - half, mean + half)
            ]
    found["simple"] = {
        m: round(np.mean([r["simple"][m] for r in rows]), 4)
        for m in METRICS
        if m in rows[0]["simple"]
    }
    for name in ("calibration_error", "log_loss", "cost"):
        if name in rows[0]:
            found[name] = [round(float(each), 4) for each in np.mean([r[name] for r in rows], 0)]
    found["seconds"] = round(float(np.mean([row["seconds"] for row in rows])), 1)
    found["peak_mib"] = max(row["peak_mib"] for row in rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--large-seeds", type=int, default=3)
    given = parser.parse_args()
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    rows = {(row["table"], row["seed"]): row for row in map(json.loads, lines)}
    paths = sorted(given.folder.glob("*.*.csv"), key=lambda path: path.stat().st_size)
    for seed in range(given.seeds):
        for path in paths:
            name, target = path.name.split(".")[:2]
            num_records = sum(1 for _ in path.open()) - 1
            if (name, seed) in rows or (num_records > MANY_RECORDS and seed >= given.large_seeds):
                continue
            row = {"table": name, "seed": seed, **measure(path.resolve(), target, seed)}
            rows[name, seed] = row
            with given.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                name, seed, row.get("comparison") or row.get("failed"), file=sys.stderr, flush=True
            )
    tables = {path.name.split(".")[0] for path in paths}
    print(
        json.dumps(
            {
                table: summary(
                    [
                        row
                        for (name, _), row in sorted(rows.items())
                        if name == table and "net" in row
                    ]
                )
                for table in sorted(tables)
            }
        )
    )


if __name__ == "__main__":
    main()
