"""Activation ranges: how far the values of each tensor reach that int8 is to represent.

None depends on the order of the records. Shapes: B bins of a histogram.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry

from train.tasks import Arrays
from train.values.records import num_rows

# The calibrator holds all activations of a batch at once.
CALIBRATION_BATCH = 32
NUM_BINS = 2048
# Steps of 8 bits.
NUM_STEPS = 255
# Shares of the whole range that are tried.
SHRUNK = np.linspace(0.1, 1.0, 91)
# A percentile leaves out about so many values at each end, but no larger or smaller share.
LEFT_OUT, MOST_LEFT_OUT, LEAST_LEFT_OUT = 32, 1e-3, 1e-5

Range = tuple[float, float]


@dataclass(frozen=True)
class _Histogram:
    """How many values of a tensor are in each of equal bins from the least to the largest."""

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
    """From the least to the largest value."""
    return histogram.low, histogram.high


def percentile(histogram: _Histogram) -> Range:
    """Without the outermost values at each end: the share of 32 values, within bounds."""
    total = int(histogram.counts_B.sum())
    share = min(max(LEFT_OUT / max(total, 1), LEAST_LEFT_OUT), MOST_LEFT_OUT)
    below_B = np.cumsum(histogram.counts_B)
    first, last = np.searchsorted(below_B, [share * total, (1 - share) * total])
    last = min(int(last), len(below_B) - 1)
    low = histogram.low + first * histogram.width
    return low, max(histogram.low + (last + 1) * histogram.width, low)


def squared_error(histogram: _Histogram) -> Range:
    """The one of some shares of the whole range whose rounding and clipping err least.

    Values within are rounded to steps, whose error is that of a uniform distribution; those beyond
    are clipped. After Banner et al., Post training 4-bit quantization of convolutional networks for
    rapid-deployment, https://arxiv.org/abs/1810.05723.
    """
    counts_B, centres_B = histogram.counts_B, histogram.centres_B
    # A range of int8 includes 0.
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


def measure_histograms(prepared: Path, scratch: Path, records: Arrays) -> dict[str, _Histogram]:
    """Return a histogram of each activation of an ONNX file over encoded records.

    The records are run twice: for the ends, and for what lies between them.
    """
    calibrator = create_calibrator(
        str(prepared),
        list(QDQRegistry),
        augmented_model_path=str(scratch / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Percentile,  # which makes outputs of all activations
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
    """Return the ranges that a method of METHODS chooses, as the quantizer takes them."""
    found = {name: METHODS[method](histogram) for name, histogram in histograms.items()}
    return TensorsData(
        CalibrationMethod.MinMax,
        {
            name: (np.array(low, np.float32), np.array(high, np.float32))
            for name, (low, high) in found.items()
        },
    )


def batches(inputs: Arrays) -> Iterator[Arrays]:
    """Records in batches for which memory is enough."""
    for start in range(0, num_rows(inputs), CALIBRATION_BATCH):
        yield {name: array[start : start + CALIBRATION_BATCH] for name, array in inputs.items()}


def _apart(low: float, high: float) -> Range:
    """The ends of a range that has a width."""
    return (low, high) if high > low else (low, low + 1e-12 * max(abs(low), 1.0))
