"""Latency of variants on this machine, by engine, number of threads and batch size."""

import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.bundle.engines import Engine
from train.bundle.manifest import BATCH_SIZES, Timing
from train.tasks import Arrays
from train.telemetry.work_bar import WorkBar
from train.values.ragged import Ragged, StoredArrays, lengths_of

LEAST_ROUNDS, MOST_ROUNDS = 5, 100
# The times of a batch that takes longer than SLOW_S seconds vary little; it is run in few rounds.
SLOW_S, SLOW_ROUNDS = 0.2, 2
# Quantiles of the lengths of records that are measured besides the median.
LENGTHS = (0.05, 0.25, 0.75, 0.95, 1.0)

# Rows of a batch, and positions of each row; None where all records have the same shape.
BatchShape = tuple[int, int | None]


class BenchmarkCase(NamedTuple):
    """One measured combination of variant, engine and number of threads."""

    variant: str
    engine: str
    threads: int


def thread_counts() -> list[int]:
    """Return the measured thread counts: 1, as in a serving replica, and the number of cores."""
    return sorted({1, num_cores()})


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def benchmark_variants(
    engines: Mapping[BenchmarkCase, Engine], inputs: StoredArrays, seconds: float
) -> dict[BenchmarkCase, list[Timing]]:
    """Return latencies of each case for every batch size in BATCH_SIZES.

    Of records that differ in length, the batches with the median length come first; the others
    have some of the sizes, and the lengths of LENGTHS. The engines run in turns, so that a change
    in the machine's speed affects all of them.

    inputs: encoded arrays [N, ...] by input name, N ≥ 1; records are repeated to fill a batch.
    seconds: time after which no new round starts. After one warm-up round there are at least
    LEAST_ROUNDS and at most MOST_ROUNDS rounds, and fewer of slow batches.
    """
    sizes = batch_shapes(lengths_of(inputs))
    batches = {shape: make_batch(inputs, *shape) for shape in sizes}
    times: dict[tuple[BenchmarkCase, BatchShape], list[float]] = {
        (measured, size): [] for size in sizes for measured in engines
    }
    # Rounds beyond LEAST_ROUNDS depend on the speed; they are short.
    with WorkBar("measuring", (LEAST_ROUNDS + 1) * len(times), "measurements") as bar:
        for key in times:
            _time(engines[key[0]], batches[key[1]])
            bar.advance()
        started = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
                break
            for (measured, size), seen in times.items():
                if done < SLOW_ROUNDS or min(seen) <= SLOW_S:
                    seen.append(_time(engines[measured], batches[size]))
                bar.advance()
    return {
        measured: [_timing(measured, *size, times[measured, size]) for size in sizes]
        for measured in engines
    }


def batch_shapes(lengths_N: np.ndarray | None) -> list[BatchShape]:
    """Return the rows and the length of the batches to measure, those of the median length first.

    lengths_N: positions of each record, int64 [N]; None if all are equal, as the results then are.
    """
    if lengths_N is None:
        return [(rows, None) for rows in BATCH_SIZES]
    typical, *others = (max(int(np.quantile(lengths_N, q)), 1) for q in (0.5, *LENGTHS))
    most = BATCH_SIZES[-1] * typical  # long batches take long, and are rare
    return [
        *((rows, typical) for rows in BATCH_SIZES),
        *(
            (rows, length)
            for length in sorted(set(others) - {typical})
            for rows in BATCH_SIZES[::2]
            if rows == 1 or rows * length <= most
        ),
    ]


def make_batch(inputs: StoredArrays, rows: int, length: int | None) -> Arrays:
    """Return a batch of repeated records: arrays of shape [rows, ...] by input name.

    length: positions of each record over all ragged inputs, which share them in proportion to
        their values.
    """
    total = sum(len(array.values_T) for array in inputs.values() if isinstance(array, Ragged))
    batch = {}
    for name, array in inputs.items():
        if isinstance(array, Ragged):
            share = len(array.values_T) / max(total, 1)
            own = max(round(share * (length or 1)), 1)
            shape = (rows, own, *array.values_T.shape[1:])
            known = array.values_T if len(array.values_T) else np.ones((1, *shape[2:]), array.dtype)
            batch[name] = np.resize(known, shape)
        else:
            batch[name] = np.resize(array[:rows], (rows, *array.shape[1:]))
    return batch


def describe_host() -> dict[str, Any]:
    """Return the processor, the number of cores and the versions of the inference packages."""
    packages = {}
    for name in ("onnxruntime", "torch", "openvino"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"processor": _processor(), "cores": num_cores(), "packages": packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _timing(measured: BenchmarkCase, rows: int, length: int | None, seconds: list[float]) -> Timing:
    low, middle, high = (float(x) * 1e3 for x in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Timing(
        engine=measured.engine,
        threads=measured.threads,
        batch_size=rows,
        length=length,
        p50_ms=middle,
        low_ms=low,
        high_ms=high,
    )


def _time(engine: Engine, inputs: Arrays) -> float:
    started = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - started
