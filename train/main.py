"""python train/main.py [--config FILE] [--dotted.option VALUE …]"""

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

from cluster import connect, storage

connect.prepare_environment()
import ray  # noqa: F401 - before the threads of `main`, which would both import it

from cluster.errors import run_command
from train import commandline


def main(argv: Sequence[str]) -> dict[str, Any]:
    config, save_to = commandline.parse(argv)
    with ThreadPoolExecutor(1) as pool:
        # Ray starts in processes of its own; meanwhile the rest is imported.
        imported = pool.submit(importlib.import_module, "train.fit")
        connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
        imported.result()
    from train.bundle import registry
    from train.data import infer
    from train.fit import fit

    config = infer.complete(config)
    if save_to:
        commandline.save(config, save_to)
    root = storage.resolve(config.storage.path)
    if not config.registry.enabled:
        return registry.summary(fit(config))
    registry.check(root, config.registry.metric)
    with registry.Recording(root, config.name, config.model_dump(mode="json")) as recording:
        bundle = fit(config, recording.observe)
        published = registry.publish(bundle, recording, root, config.registry.metric)
    return registry.summary(bundle) | published


if __name__ == "__main__":
    run_command(main)
