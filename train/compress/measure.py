"""How fast a variant is on this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from train.bundle.engines import Engine
from train.tasks import Arrays

BATCH_SIZE = 32
ROUNDS = 30


@dataclass(frozen=True)
class Speed:
    p50_ms: float
    records_per_s: float


def speeds(engines: Mapping[str, Engine], inputs: Arrays) -> dict[str, Speed]:
    """Measure engines in turns, so that drift of the machine hits all alike.

    inputs: at least one encoded record. Latency is the median over rounds for a batch of one,
    throughput the median for a batch of 32.
    """
    single = {name: array[:1] for name, array in inputs.items()}
    batch = {
        name: np.resize(array, (BATCH_SIZE, *array.shape[1:])) for name, array in inputs.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for round_number in range(ROUNDS + 1):
        for name, engine in engines.items():
            seconds = (_time(engine, single), _time(engine, batch))
            if round_number > 0:  # the first is the warm-up
                times[name].append(seconds)
    medians = {name: np.median(values, axis=0) for name, values in times.items()}
    return {
        name: Speed(p50_ms=float(one) * 1e3, records_per_s=BATCH_SIZE / float(many))
        for name, (one, many) in medians.items()
    }


def _time(engine: Engine, inputs: Arrays) -> float:
    started = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - started
