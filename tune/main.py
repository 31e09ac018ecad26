"""python tune/main.py [--config FILE] [--num-trials N] [--max-minutes M] [--option VALUE …]"""

import importlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Python puts this file's folder first on the path, and Ray forwards that entry to its workers. The
# modules in the folder would hide packages of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])
# For the user's own tasks and networks.
sys.path.insert(1, str(Path.cwd()))

from cluster import connect

connect.set_ray_environment()
import ray  # noqa: F401 - here, because two threads of `main` would import it at the same time

from cluster.cli import run_command
from train.data.schema import inference
from tune import cli


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the study that a command line describes; return its result."""
    config = cli.parse(argv)
    inference.check_source(config)
    with ThreadPoolExecutor(1) as pool:
        # The import runs while Ray starts, which happens in other processes.
        imported = pool.submit(importlib.import_module, "tune.tuner")
        connect.connect(num_cpus=config.workers.all_cpus, metrics=False, logs=False)
        imported.result()
    from tune import tuner

    return {**tuner.tune(config)}


if __name__ == "__main__":
    run_command(main)
