"""Train a model: python train/main.py [--config FILE] [--dotted.option VALUE …]"""

import importlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Python puts this file's folder first on sys.path, so its modules would shadow packages of the same
# name. Ray passes this entry on to its workers.
sys.path[0] = str(Path(__file__).resolve().parents[1])
# Custom tasks and networks are imported from the current directory.
sys.path.insert(1, str(Path.cwd()))

from cluster import connect

connect.set_ray_environment()
import ray  # noqa: F401 - imported before two threads in `main` would import it concurrently

from cluster.cli import run_command
from train import cli
from train.data.schema import inference


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Train, compress and register a model; return a summary of its bundle."""
    config, save_to = cli.parse(argv)
    inference.check_source(config)
    with ThreadPoolExecutor(1) as pool:
        # Ray starts in separate processes; import the remaining modules in the meantime.
        imported = pool.submit(importlib.import_module, "train.training")
        connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
        imported.result()
    from train.bundle import publishing
    from train.training import complete, train_and_register

    completed = complete(config)
    if save_to:
        cli.save_config(completed.config, save_to)
    bundle, published = train_and_register(completed)
    return publishing.bundle_summary(bundle) | published


if __name__ == "__main__":
    run_command(main)
