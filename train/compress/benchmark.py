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

LEAST_ROUNDS, MOST_ROUNDS = 5, 100


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
    engines: Mapping[BenchmarkCase, Engine], inputs: Arrays, seconds: float
) -> dict[BenchmarkCase, list[Timing]]:
    """Return latencies of each case for every batch size in BATCH_SIZES.

    The engines run in turns, so that a change in the machine's speed affects all of them.

    inputs: encoded arrays [N, ...] by input name, N ≥ 1; records are repeated to fill a batch.
    seconds: time after which no new round starts. After one warm-up round there are at least
    LEAST_ROUNDS and at most MOST_ROUNDS rounds.
    """
    batches = {
        size: {name: np.resize(array, (size, *array.shape[1:])) for name, array in inputs.items()}
        for size in BATCH_SIZES
    }
    times: dict[tuple[BenchmarkCase, int], list[float]] = {
        (measured, size): [] for size in BATCH_SIZES for measured in engines
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
                seen.append(_time(engines[measured], batches[size]))
                bar.advance()
    return {
        measured: [_timing(measured, size, times[measured, size]) for size in BATCH_SIZES]
        for measured in engines
    }


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


def _timing(measured: BenchmarkCase, size: int, seconds: list[float]) -> Timing:
    low, middle, high = (float(x) * 1e3 for x in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Timing(
        engine=measured.engine,
        threads=measured.threads,
        batch_size=size,
        p50_ms=middle,
        low_ms=low,
        high_ms=high,
    )


def _time(engine: Engine, inputs: Arrays) -> float:
    started = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - started
