"""The same search with plain Optuna in one process: its TPE sampler and median pruner, no Ray.

python tests/bench/peers/optuna_search.py STORAGE SEED NUM_TRIALS
Prints a JSON object for each epoch: trial, seconds since the start, validation loss.
"""

import json
import sys
import time

started = time.perf_counter()

from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import optuna
import torch

from train.data import dataset
from train.data.schema import inference
from train.loop.loop import Loop
from train.loop.parallelism import Worker
from train.loop.run_directory import Run
from tune import search_space
from tune.cli import parse, training_config


def main(root: str, seed: int, num_trials: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = parse(["--storage.path", root, "--seed", str(seed)])
    base = inference.complete_config(training_config(config)).config
    data = dataset.prepare_dataset(base, root)
    dimensions = config.tune.space
    distributions = {name: each.distribution() for name, each in dimensions.items()}
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    for number in range(num_trials):
        trial = study.ask(distributions)
        values = {name: dimensions[name].value(raw) for name, raw in trial.params.items()}
        options = search_space.with_values(base, values)
        run = Run.start(f"{root}/optuna/{number}", options)
        worker = Worker(0, 1, torch.device("cpu"))
        loop = Loop(options, data, worker, run.store(2), num_micro_batches=1)
        state = optuna.trial.TrialState.COMPLETE
        for epoch, _ in enumerate(loop.epochs()):
            value = loop.progress.history[-1]["valid_loss"]
            now = time.perf_counter() - started
            print(json.dumps({"trial": number, "seconds": now, "value": value}), flush=True)
            trial.report(value, epoch)
            if trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        best = min(row["valid_loss"] for row in loop.progress.history)
        study.tell(trial, best if state.name == "COMPLETE" else None, state=state)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
