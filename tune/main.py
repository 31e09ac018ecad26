"""python tune/main.py [--config FILE] [--num-trials N] [--max-minutes M] [--option VALUE …]"""

import importlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Python puts this file's folder first, where its modules would hide packages of the same name;
# Ray forwards that entry to its workers.
sys.path[0] = str(Path(__file__).resolve().parents[1])
# Where a user's own tasks and nets are.
sys.path.insert(1, str(Path.cwd()))

from cluster import connect

connect.set_ray_environment()
import ray  # noqa: F401 - before the threads of `main`, which would both import it

from cluster.cli import run_command
from train.data.schema import inference
from tune import cli


def main(argv: Sequence[str]) -> dict[str, Any]:
    config = cli.parse(argv)
    inference.check_source(config)
    with ThreadPoolExecutor(1) as pool:
        # Ray starts in processes of its own; meanwhile the rest is imported.
        imported = pool.submit(importlib.import_module, "tune.tuner")
        connect.connect(num_cpus=config.workers.all_cpus, metrics=False, logs=False)
        imported.result()
    from tune import tuner

    return tuner.tune(config, config.storage.root)


if __name__ == "__main__":
    run_command(main)
