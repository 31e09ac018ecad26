"""python -m tests.bench.tables FOLDER --results FILE: nets against simple models on many tables.

FOLDER has files NAME.TARGET.csv. Each is trained with `--data.train F --target C` alone, once for
each of `--seeds` splits, in a process of its own; lines of FILE that are there are not made again.
The simple models are those that a run fits beside its net, the better by validation loss. The last
line on stdout is a JSON object: for each table the mean paired difference from the simple model,
net and default variant, with its 95 % interval over splits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.server import REPOSITORY
from train.bundle import Bundle
from train.tasks import ClassTarget

# Student's t at 0.975 by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
METRICS = ("test_loss", "test_auc", "test_r2", "test_accuracy")


def measure(path: Path, target: str, seed: int) -> dict[str, Any]:
    """Train on one split of a table; return what its bundle says."""
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
        output, errors = (file.read_text() for file in files)
        if status:
            return {"failed": errors.strip().splitlines()[-2:]}
        result = json.loads(output.splitlines()[-1])
        bundle = Bundle.load(result["bundle"])
        return {
            "seconds": round(time.monotonic() - began, 1),
            "peak_mib": round(usage.ru_maxrss / 1024),
            "temperature": (
                bundle.task.target.temperature if isinstance(bundle.task.target, ClassTarget) else 1
            ),
            "net": result["metrics"],
            "default": result["variants"][result["default_variant"]],
            "default_variant": result["default_variant"],
            "simple": next(iter(result["simple_models"].values())),
            "simple_name": next(iter(result["simple_models"])),
            "comparison": result["comparison"],
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of net and default variant from the simple model, by metric."""
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
    found["seconds"] = round(float(np.mean([row["seconds"] for row in rows])), 1)
    found["peak_mib"] = max(row["peak_mib"] for row in rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    rows = {(row["table"], row["seed"]): row for row in map(json.loads, lines)}
    paths = sorted(given.folder.glob("*.*.csv"), key=lambda path: path.stat().st_size)
    for seed in range(given.seeds):
        for path in paths:
            name, target = path.name.split(".")[:2]
            if (name, seed) in rows:
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
