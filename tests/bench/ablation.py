"""python -m tests.bench.ablation FOLDER --results FILE: the gain of each part of a net for tables.

FOLDER contains files NAME.TARGET.csv. For each table, nets are trained that have one more part than
the net before: a plain net with two hidden layers after 40 epochs; numbers encoded in pieces; an
ensemble; the epoch with the least validation loss or from cross-validation; a temperature. Rows
that FILE already contains are not computed again. The last line on stdout is a JSON object: the
metrics on the test split for each table and part.
"""

import argparse
import io
import json
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from train.calibration import fit_temperature
from train.config import LAST, Config, validate_config
from train.cross_validation import choose_epochs
from train.data import dataset
from train.data.dataset import EncodedDataset
from train.data.schema import inference
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.evaluate import evaluate
from train.loop.loop import Loop
from train.loop.net_setup import build_net
from train.loop.parallelism import Worker

PLAIN = {"net.members": 1, "net.bins": 2, "optim.epochs": 40, "checkpoint.metric": LAST}
PLAIN |= {"stop.metric": None, "stop.folds": 0}
# For each part, the options of the plain net that return to their defaults.
PARTS = {
    "plain": (),
    "+ pieces of numbers": ("net.bins",),
    "+ ensemble": ("net.members",),
    "+ early stopping": ("optim.epochs", "checkpoint.metric", "stop.metric", "stop.folds"),
}
CALIBRATED = "+ calibration"
ALONE = Worker(0, 1, torch.device("cpu"))


def measure(path: Path, target: str, seed: int) -> dict[str, dict[str, float]]:
    """Return the metrics on the test split for each part."""
    with TemporaryDirectory() as root, redirect_stderr(io.StringIO()):
        given = {"name": "x", "target": target, "storage": {"path": root}}
        options = {**given, "data": {"train": str(path.resolve()), "split_seed": seed}}
        config = inference.complete_config(validate_config(options)).config
        data = dataset.prepare_dataset(config, root)
        found, changes = {}, dict(PLAIN)
        for part, parts in PARTS.items():
            changes = {name: value for name, value in changes.items() if name not in parts}
            began = time.perf_counter()
            valid, test = outputs_of(changed(config, changes), data, f"{root}/{len(found)}")
            seconds = {"seconds": round(time.perf_counter() - began, 1)}
            task, truths = data.task, data.open("test")[1]
            found[part] = task.metrics(test, truths, "test") | seconds
        temperature = fit_temperature(data.task, valid, data.open("valid")[1])
        calibrated = data.task.calibrated(temperature).metrics(test, truths, "test")
        return found | {CALIBRATED: calibrated | seconds}


def changed(config: Config, changes: dict[str, Any]) -> Config:
    values = config.model_dump(mode="json")
    for name, value in changes.items():
        section, option = name.split(".")
        values[section][option] = value
    return Config.model_validate(values)


def outputs_of(config: Config, data: EncodedDataset, folder: str) -> tuple[Any, Any]:
    """Train a net; return its outputs for the validation and the test split."""
    if config.stop.folds:
        after = choose_epochs(config, data)[0]
        config = changed(config, {"stop.after": after, "checkpoint.metric": LAST})
    store = CheckpointManager(folder, 2)
    store.claim(store.hand_over())
    Loop(config, data, ALONE, store, num_micro_batches=1).run()
    net = build_net(config, data.task)
    net.load_state_dict(load_best_weights(store)[0])
    net.eval()
    return tuple(evaluate(net, data.open(split)[0], ALONE) for split in ("valid", "test"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    rows = {(row["table"], row["seed"]): row["parts"] for row in map(json.loads, lines)}
    paths = sorted(given.folder.glob("*.*.csv"), key=lambda path: path.stat().st_size)
    for seed in range(given.seeds):
        for path in paths:
            name, target = path.name.split(".")[:2]
            if (name, seed) in rows:
                continue
            rows[name, seed] = measure(path, target, seed)
            with given.results.open("a") as file:
                row = {"table": name, "seed": seed, "parts": rows[name, seed]}
                file.write(json.dumps(row) + "\n")
            print(name, seed, file=sys.stderr, flush=True)
    print(json.dumps({f"{name} {seed}": parts for (name, seed), parts in rows.items()}))


if __name__ == "__main__":
    main()
