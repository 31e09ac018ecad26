"""How soon drift is detected, and how often there are false alarms.

    python tests/bench/drift.py models:/cifar10@production --data test.parquet \
        [--window 500] [--alarm-rate 0.001] [--storage runs]
    python tests/bench/drift.py models:/titanic@production --data titanic.csv --window 100

Records of a source, clean and changed, pass through the predictor and the monitor, as requests do
in a server. If training split the source, give only the rows that it did not train on. The last
line on stdout is a JSON object of all figures.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from serve.drift import statistics
from serve.drift.sampler import BLOCK_ROWS, Block
from serve.drift.statistics import Thresholds
from serve.drift.windows import DriftMonitor
from train.bundle import Bundle, Predictor, feature_statistics, registry
from train.bundle.feature_statistics import Quantity, QuantityValues
from train.data.reading import sources
from train.data.reading.samples import sample_source
from train.tasks import ClassTarget, Columns

RESAMPLED = 200
BATCH_ROWS, MAX_RECORDS = 256, 10_000

Change = Callable[[Columns], Columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="records that were not used in training")
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--alarm-rate", type=float, default=0.001)
    parser.add_argument("--storage", default="runs")
    given = parser.parse_args()
    location, _ = registry.resolve_model(given.model, storage.resolve_path(given.storage))
    predictor = Predictor.load(Bundle.load(location), num_threads=2)
    columns = sample_source(sources.find_source(given.data), MAX_RECORDS)
    watched = predictor.bundle.quantities
    count = _count(columns)
    result: dict[str, Any] = {"records": count, "window": given.window}

    clean = _measured(predictor, columns)
    for rate in dict.fromkeys((given.alarm_rate, 0.05)):
        drawn = statistics.draw_thresholds(watched, given.window, rate)
        result[f"false alarms at {rate:g}"] = _false_alarms(watched, drawn, clean, count)
    drawn = statistics.draw_thresholds(watched, given.window, given.alarm_rate)
    order = np.random.default_rng(0).permutation(count)
    windows = _stream(watched, drawn, clean, order)
    result["clean"] = f"{windows.num_alarmed} of {windows.num_full} windows with an alarm"
    for name, found in result.items():
        print(f"{name:28} {found}")

    result["changed"] = {}
    for name, change in _changes(predictor, columns).items():
        measured = _measured(predictor, change(columns))
        order = np.random.default_rng(1).permutation(len(next(iter(measured.values())).values))
        windows = _stream(watched, drawn, measured, order)
        first = next((i for i, window in enumerate(windows.full) if window.alarms), None)
        found = {
            "after requests": None if first is None else (first + 1) * given.window,
            "windows": f"{windows.num_alarmed} of {windows.num_full}",
        }
        if first is not None:
            alarms = windows.full[first].alarms
            furthest = max(alarms, key=lambda alarm: alarm.score / alarm.threshold)
            found["by"] = sorted({alarm.feature for alarm in alarms})
            found["furthest"] = f"{furthest.feature} {furthest.score / furthest.threshold:.1f} x"
        result["changed"][name] = found
        print(f"{name:28} {found}")
    print(json.dumps(result))


def _measured(predictor: Predictor, columns: Columns) -> dict[str, QuantityValues]:
    parts = []
    for part in _parts(_count(columns), BATCH_ROWS):
        rows = predictor.encode({name: values[part] for name, values in columns.items()})
        parts.append(
            feature_statistics.measure_quantities(predictor.task, rows, predictor.run(rows))
        )
    return {
        name: QuantityValues(
            each.kind, each.of, np.concatenate([part[name].values for part in parts]), each.labels
        )
        for name, each in parts[0].items()
    }


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _count(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _block(
    watched: dict[str, Quantity], measured: dict[str, QuantityValues], rows: np.ndarray
) -> Block:
    return {name: quantity.count(measured[name].values[rows]) for name, quantity in watched.items()}


def _stream(
    watched: dict[str, Quantity],
    drawn: Thresholds,
    measured: dict[str, QuantityValues],
    order: np.ndarray,
) -> DriftMonitor:
    """Add the records to a new monitor in the given order, one block at a time."""
    windows = DriftMonitor(watched, drawn.rows, 1.0, drawn)
    for part in _parts(len(order) // BLOCK_ROWS * BLOCK_ROWS, BLOCK_ROWS):
        windows.add(_block(watched, measured, order[part]))
    return windows


def _false_alarms(
    watched: dict[str, Quantity], drawn: Thresholds, measured: dict[str, QuantityValues], count: int
) -> str:
    """Return how many windows of records drawn from the clean ones raise an alarm."""
    generator = np.random.default_rng(2)
    alarmed = 0
    for _ in range(RESAMPLED):
        order = generator.choice(count, drawn.rows, replace=False)
        alarmed += _stream(watched, drawn, measured, order).num_alarmed
    return f"{alarmed} of {RESAMPLED}"


def _changes(predictor: Predictor, columns: Columns) -> dict[str, Change]:
    """Return changes that may happen to records of this kind, by name."""
    changes: dict[str, Change] = {}
    for column in predictor.task.features.images:
        changes["brightness x 0.6"] = _per_image(column, lambda image: _darker(image, 0.6))
        changes["brightness x 0.9"] = _per_image(column, lambda image: _darker(image, 0.9))
        changes["JPEG quality 10"] = _per_image(column, lambda image: _saved(image, 10))
        changes["JPEG quality 50"] = _per_image(column, lambda image: _saved(image, 50))
    target = predictor.task.target
    if isinstance(target, ClassTarget) and len(target.classes) > 2:
        two = target.classes[:2]
        changes[f"only {two[0]} and {two[1]}"] = lambda given: _kept(given, target.column, two)
    if "age" in columns:
        changes["age + 10"] = lambda given: {**given, "age": _older(given["age"], 10)}
        changes["age + 20"] = lambda given: {**given, "age": _older(given["age"], 20)}
        changes["age missing"] = lambda given: {**given, "age": [None] * _count(given)}
    if "embarked" in columns:
        changes["'S' renamed in embarked"] = lambda given: {
            **given,
            "embarked": ["Southampton" if at == "S" else at for at in given["embarked"]],
        }
    return changes


def _older(ages: Any, years: float) -> list[float | None]:
    """Add years to ages in the form of a CSV file, in which some are missing."""
    return [float(age) + years if age not in (None, "") else None for age in ages]


def _kept(columns: Columns, column: str, names: Sequence[str]) -> Columns:
    rows = [row for row, name in enumerate(columns[column]) if str(name) in names]
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _per_image(column: str, change: Callable[[Image.Image], Image.Image]) -> Change:
    def changed(columns: Columns) -> Columns:
        return {**columns, column: [_file(change(_image(value))) for value in columns[column]]}

    return changed


def _image(value: Any) -> Image.Image:
    return Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value))


def _darker(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _saved(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
