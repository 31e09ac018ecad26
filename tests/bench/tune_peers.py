"""Comparison of searches on the shipped study of digits: best loss and time to reach it.

python tests/bench/tune_peers.py [--seeds 3] [--num-trials 24] [--arms halyard optuna …]

Compares Halyard as shipped (Gaussian process, ASHA, the unchanged config as first trial), the same
without that first trial, its random search, and plain Optuna in one process. Times are measured
from the start of the command, including Python's imports and Ray's start. Prints a table and one
JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
RANDOM = ("--tune.sampler", "random", "--tune.scheduler.name", "none", "--tune.start", "false")
ARMS = {
    "halyard": (),
    "halyard, no first": ("--tune.start", "false"),
    "random": RANDOM,
    "optuna": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-trials", type=int, default=24)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    arms = {name: ARMS[name] for name in ARMS if name in (*options.arms, "random")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        # In turns, so that slow changes of the machine's speed affect all arms equally.
        for name, arguments in arms.items():
            with tempfile.TemporaryDirectory(prefix="tune-") as root:
                run = optuna if arguments is None else halyard
                found[name].append(run(root, seed, options.num_trials, arguments or ()))
            print(seed, name, shown(found[name][-1]), file=sys.stderr, flush=True)
    for seed in range(options.seeds):
        wanted = found["random"][seed]
        for name in arms:
            mine = found[name][seed]
            mine["reached_s"] = reached(mine["values"], wanted["best"])
            mine["ratio"] = mine["reached_s"] / reached(wanted["values"], wanted["best"])
            mine["of_all"] = mine["reached_s"] / wanted["search_s"]
    print(f"{'':20} minutes  best loss  s to random's best  ratio to random's  of random total")
    for name, runs in found.items():
        print(
            f"{name:20} {np.mean([run['search_s'] for run in runs]) / 60:7.2f}"
            f"  {np.mean([run['best'] for run in runs]):9.4f}"
            f"  {' '.join(format(run['reached_s'], '5.0f') for run in runs):>18}"
            f"  {' '.join(format(run['ratio'], '5.2f') for run in runs):>17}"
            f"  {' '.join(format(run['of_all'], '5.2f') for run in runs):>15}"
        )
    overheads = [run["overhead_s"] for name in arms for run in found[name] if "overhead_s" in run]
    print(f"overhead per trial: {np.mean(overheads):.2f} s, at most {max(overheads):.2f} s")
    rows = {
        name: [{key: value for key, value in run.items() if key != "values"} for run in runs]
        for name, runs in found.items()
    }
    print(json.dumps(rows))


def halyard(root: str, seed: int, num_trials: int, arguments: tuple[str, ...]) -> dict:
    """Run the search command; return its figures, which are read from the study's files."""
    began = time.time()
    subprocess.run(
        [
            *(sys.executable, "tune/main.py", "--storage.path", root, "--seed", str(seed)),
            *("--num-trials", str(num_trials), "--compress.measure_seconds", "0.2"),
            *("--registry.enabled", "false"),
            *arguments,
        ],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    all_s = time.time() - began
    files = sorted(Path(root, "studies/digits/trials").glob("*.json"))
    trials = [json.loads(file.read_text()) for file in files]
    values = [
        (report["time"] - began, report["figures"]["valid_loss"])
        for trial in trials
        for report in trial["reports"]
    ]
    # Time of a trial apart from its epochs. The first two trials include the processes' start.
    trained = [sum(report["figures"]["seconds"] for report in trial["reports"]) for trial in trials]
    lasted = [trial["ended_at"] - trial["began"] for trial in trials]
    overheads = [all_of_it - own for all_of_it, own in zip(lasted, trained, strict=True)][2:]
    per_epoch = np.mean([len(trial["reports"]) for trial in trials])
    return {
        "values": sorted(values),
        "search_s": max(time for time, _ in values),
        "all_s": all_s,
        "best": min(value for _, value in values),
        "overhead_s": float(np.median(overheads)),
        "epochs": float(per_epoch * len(trials)),
    }


def optuna(root: str, seed: int, num_trials: int, arguments: tuple[str, ...]) -> dict:
    script = HERE / "peers" / "optuna_search.py"
    began = time.time()
    done = subprocess.run(
        [sys.executable, str(script), root, str(seed), str(num_trials)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    values = [(row["seconds"], row["value"]) for row in rows]
    return {
        "values": values,
        "search_s": values[-1][0],
        "all_s": time.time() - began,
        "best": min(value for _, value in values),
        "epochs": float(len(rows)),
    }


def reached(values: list[tuple[float, float]], wanted: float) -> float:
    """Return the seconds until a value was at most `wanted`; infinity if none was."""
    return min((seconds for seconds, value in values if value <= wanted), default=float("inf"))


def shown(run: dict) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in run.items() if key != "values")


if __name__ == "__main__":
    main()
