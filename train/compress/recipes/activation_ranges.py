"""Activation ranges: the interval of each tensor's values that int8 represents.

The ranges do not depend on the order of the records. Shapes: N records, B bins of a histogram.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry

from train.tasks import Arrays
from train.values.ragged import StoredArrays, by_length
from train.values.records import num_rows

# Records per batch; the calibrator keeps all activations of a batch in memory.
CALIBRATION_BATCH = 32
NUM_BINS = 2048
# Steps between the 256 values of 8 bits.
NUM_STEPS = 255
# Shares of the whole range among which `squared_error` chooses.
SHRUNK = np.linspace(0.1, 1.0, 91)
# `percentile` drops about LEFT_OUT values at each end, within these bounds of the share.
LEFT_OUT, MOST_LEFT_OUT, LEAST_LEFT_OUT = 32, 1e-3, 1e-5

Range = tuple[float, float]


@dataclass(frozen=True)
class _Histogram:
    """A histogram of a tensor's values, with equal bins from the minimum to the maximum."""

    low: float
    high: float
    counts_B: np.ndarray

    @property
    def centres_B(self) -> np.ndarray:
        edges = np.linspace(self.low, self.high, len(self.counts_B) + 1)
        return (edges[1:] + edges[:-1]) / 2

    @property
    def width(self) -> float:
        return (self.high - self.low) / len(self.counts_B)


def minmax(histogram: _Histogram) -> Range:
    """Return the range from the minimum to the maximum."""
    return histogram.low, histogram.high


def percentile(histogram: _Histogram) -> Range:
    """Return the range without about LEFT_OUT values at each end.

    Their share is kept between LEAST_LEFT_OUT and MOST_LEFT_OUT.
    """
    total = int(histogram.counts_B.sum())
    share = min(max(LEFT_OUT / max(total, 1), LEAST_LEFT_OUT), MOST_LEFT_OUT)
    below_B = np.cumsum(histogram.counts_B)
    first, last = np.searchsorted(below_B, [share * total, (1 - share) * total])
    last = min(int(last), len(below_B) - 1)
    low = histogram.low + first * histogram.width
    return low, max(histogram.low + (last + 1) * histogram.width, low)


def squared_error(histogram: _Histogram) -> Range:
    """Return the share of the whole range with the least squared rounding and clipping error.

    Rounding errors of values inside the range are uniformly distributed; values outside are
    clipped. After Banner et al., Post training 4-bit quantization of convolutional networks for
    rapid-deployment, https://arxiv.org/abs/1810.05723.
    """
    counts_B, centres_B = histogram.counts_B, histogram.centres_B
    # int8 must represent 0 exactly, so the range includes it.
    whole = min(histogram.low, 0.0), max(histogram.high, 0.0)

    def error(share: float) -> float:
        low, high = share * whole[0], share * whole[1]
        clipped_B = centres_B - np.clip(centres_B, low, high)
        rounding = ((high - low) / NUM_STEPS) ** 2 / 12
        return float(np.sum(counts_B * np.where(clipped_B == 0, rounding, clipped_B**2)))

    best = min(reversed(SHRUNK), key=error)
    return best * whole[0], best * whole[1]


METHODS: dict[str, Callable[[_Histogram], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "squared_error": squared_error,
}


def measure_histograms(
    prepared: Path, scratch: Path, records: StoredArrays
) -> dict[str, _Histogram]:
    """Return a histogram of each activation of an ONNX file over encoded records.

    records: arrays [N, ...] by input name. The model runs on them twice: first to find the minimum
    and maximum of each activation, then to count the values in the bins.
    """
    calibrator = create_calibrator(
        str(prepared),
        list(QDQRegistry),
        augmented_model_path=str(scratch / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Percentile,  # adds all activations as outputs
    )
    session = calibrator.infer_session
    names = [output.name for output in session.get_outputs()]

    def run() -> Iterator[tuple[str, np.ndarray]]:
        for batch in batches(records):
            for name, values in zip(names, session.run(None, batch), strict=True):
                if np.issubdtype(values.dtype, np.floating) and values.size:
                    yield name, values[np.isfinite(values)].astype(np.float64)

    ends: dict[str, Range] = {}
    for name, values in run():
        if values.size:
            low, high = ends.get(name, (np.inf, -np.inf))
            ends[name] = min(low, float(values.min())), max(high, float(values.max()))
    counts = {name: np.zeros(NUM_BINS, np.int64) for name in ends}
    for name, values in run():
        if name in counts:
            counts[name] += np.histogram(values, NUM_BINS, _apart(*ends[name]))[0]
    return {name: _Histogram(*_apart(*ends[name]), counts[name]) for name in ends}


def choose_ranges(histograms: dict[str, _Histogram], method: str) -> TensorsData:
    """Return the ranges chosen by a method of METHODS, in the form that the quantizer expects."""
    found = {name: METHODS[method](histogram) for name, histogram in histograms.items()}
    return TensorsData(
        CalibrationMethod.MinMax,
        {
            name: (np.array(low, np.float32), np.array(high, np.float32))
            for name, (low, high) in found.items()
        },
    )


def batches(inputs: StoredArrays) -> Iterator[Arrays]:
    """Yield arrays [N, ...] in batches of at most CALIBRATION_BATCH records, the shortest first."""
    count = num_rows(inputs)
    order = by_length(inputs)
    order = np.arange(count) if order is None else order
    for start in range(0, count, CALIBRATION_BATCH):
        rows = order[start : start + CALIBRATION_BATCH]
        yield {name: array[rows] for name, array in inputs.items()}


def _apart(low: float, high: float) -> Range:
    """Return the range, slightly widened if it is empty."""
    return (low, high) if high > low else (low, low + 1e-12 * max(abs(low), 1.0))
