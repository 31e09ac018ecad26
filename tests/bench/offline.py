"""Offline inference on many rows, killed half-way and run again.

`python tests/bench/offline.py [--rows 1000000]`

Trains a small model on a table with numbers, dates, categories and texts. Predicts the rows once
without interruption and once with a SIGKILL after half of the parts, and checks that every row is
present once with the same prediction.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from tests.serve.offline.test_offline import KINDS, make_table

ROWS_PER_FILE = 50_000


def run(arguments: list[str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def written(output: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted(output.glob("part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draws = np.random.default_rng(0)
        make_table(20_000, draws).to_csv(root / "train.csv", index=False)
        model = run(
            [
                *("train/main.py", "--data.train", str(root / "train.csv"), "--target", "y"),
                *(
                    "--features",
                    json.dumps(KINDS),
                    "--optim.epochs",
                    "2",
                    "--task_type",
                    "classification",
                ),
                *("--storage.path", str(root / "runs"), "--registry.enabled", "false"),
            ]
        )["bundle"]
        (root / "rows").mkdir()
        for number in range(rows // ROWS_PER_FILE):
            table = make_table(ROWS_PER_FILE, draws)
            table["age"] = table["age"].astype(float)
            table.to_parquet(root / "rows" / f"{number:04}.parquet", row_group_size=10_000)

        def command(output: str) -> list[str]:
            options = ["--model", str(model), "--input", str(root / "rows")]
            return ["-m", "serve.offline", *options, "--output", str(root / output)]

        whole = run(command("whole"))
        print(json.dumps({"undisturbed": whole}), flush=True)
        output = root / "killed"
        process = subprocess.Popen([sys.executable, *command("killed")], cwd=REPOSITORY)
        while len(list(output.glob("part-*.parquet"))) < rows // 10_000 // 2:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        parts = len(list(output.glob("part-*.parquet")))
        again = run(command("killed"))
        one, other = written(root / "whole"), written(output)
        result = {
            "parts_before_the_kill": parts,
            "rows_the_second_time": again["rows_this_time"],
            "rows": len(other),
            "each_once": sorted(other["row"]) == list(range(rows)),
            "same_answers": one["label"].tolist() == other["label"].tolist(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
