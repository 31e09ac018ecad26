"""Overhead of Ray Train: steady samples per second and the time to the first step.

    .venv/bin/python tests/bench/train_overhead.py [--rounds 3]

Runs the same loop in turns with `train/main.py` on two workers, under torchrun with two processes,
and in one process with two threads. A bare TorchTrainer with Ray's default settings and an empty
function gives the reference for the time to the first line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from tests.train.tasks.test_tasks import image_bytes
from train.cli import parse
from train.config import Config
from train.data import dataset
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Loop
from train.loop.parallelism import Worker

EPOCHS = 4
NUM_IMAGES = 6000

BARE = """
import time, ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

def noop():
    import sys
    sys.stderr.write("first line\\n")

ray.init()
TorchTrainer(noop, scaling_config=ScalingConfig(num_workers=2)).fit()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    num_rounds = parser.parse_args().rounds
    os.chdir(REPOSITORY)
    with tempfile.TemporaryDirectory() as folder:
        options = prepare(Path(folder))
        rates: dict[str, list[float]] = {"fit": [], "torchrun": [], "plain": []}
        starts: dict[str, list[float]] = {"fit": [], "bare": []}
        for number in range(num_rounds):
            place = Path(folder) / str(number)
            rate, start_s = by_fit(options, place)
            rates["fit"].append(rate)
            starts["fit"].append(start_s)
            launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2"]
            rates["torchrun"].append(by_loop(launcher, options, place / "torchrun"))
            rates["plain"].append(by_loop([sys.executable], options, place / "plain"))
            starts["bare"].append(seconds_to(b"first line", [sys.executable, "-c", BARE])[0])
    print(
        json.dumps(
            {
                "samples_per_s": {
                    name: [round(x) for x in values] for name, values in rates.items()
                },
                "fit_to_torchrun": round(median(rates["fit"]) / median(rates["torchrun"]), 3),
                "seconds_to_first_step": {
                    name: [round(x, 1) for x in values] for name, values in starts.items()
                },
                "start_to_bare": round(median(starts["fit"]) / median(starts["bare"]), 3),
            }
        )
    )


def prepare(folder: Path) -> list[str]:
    """Write random images and their shards; return the options of a run on them."""
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    rows = [{"image": image_bytes(image), "label": n % 10} for n, image in enumerate(images)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    options = [
        *("--config", str(REPOSITORY / "train/configs/digits.yaml")),
        *("--data.train", str(folder / "train.parquet"), "--net.widths", "[64,128,128]"),
        *("--optim.epochs", str(EPOCHS), "--optim.batch_size", "256"),
        *("--storage.path", str(folder), "--registry.enabled", "false"),
    ]
    config = parse(options).config
    dataset.prepare_dataset(config, config.storage.path)
    return options


def steady(history: list[dict[str, float]]) -> float:
    """Return the median samples per second after the first epoch, which is the warm-up."""
    return median(row["samples_per_s"] for row in history[1:])


def by_fit(options: list[str], place: Path) -> tuple[float, float]:
    place.mkdir(parents=True)
    start_s, output = seconds_to(b"training on", [sys.executable, "train/main.py", *options])
    bundle = Path(json.loads(output.splitlines()[-1])["bundle"])
    return steady(json.loads((bundle / "report/history.json").read_text())), start_s


def by_loop(launcher: list[str], options: list[str], place: Path) -> float:
    command = [*launcher, __file__, "--loop", str(place), *options]
    subprocess.run(command, check=True, capture_output=True)
    return steady(load_best_weights(CheckpointManager(str(place), keep=2))[1])


def seconds_to(words: bytes, command: list[str]) -> tuple[float, bytes]:
    """Run a command; return the seconds until stderr has a line with `words`, and the stdout."""
    started = time.perf_counter()
    found_s = None
    with tempfile.TemporaryFile() as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)
        assert process.stderr is not None
        for line in process.stderr:
            if words in line and found_s is None:
                found_s = time.perf_counter() - started
        assert process.wait() == 0
        assert found_s is not None
        stdout.seek(0)
        return found_s, stdout.read()


def loop(place: str, config: Config) -> None:
    """Train in one process of torchrun, or in the only process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(2 // world_size)
    if world_size > 1:
        dist.init_process_group("gloo")
    worker = Worker(int(os.environ.get("RANK", "0")), world_size, torch.device("cpu"))
    data = dataset.prepare_dataset(config, config.storage.path)
    Loop(config, data, worker, CheckpointManager(place, keep=2), num_micro_batches=2).run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        loop(sys.argv[2], parse(sys.argv[3:]).config)
    else:
        main()
