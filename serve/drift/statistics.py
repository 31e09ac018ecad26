"""Drift statistics of a window's counts against the baseline's, and their alarm thresholds.

Thresholds come from simulation. If nothing has changed, a window of n records and the m held-out
records of the baseline are drawn from the same distribution, so pairs of such draws show how large
each statistic becomes by chance. All statistics of a model share one false-alarm rate: the
threshold of a statistic is its own 99th percentile times a factor. The factor is the same for all
statistics and is chosen so that the accepted fraction of simulated windows exceeds any threshold.
Statistics are simulated as if they were independent; where they are not, false alarms are rarer.

Shapes: B bins, D dimensions of an embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.bundle.feature_statistics import Quantity

# Simulated windows.
NUM_DRAWS = 10_000
# Added to each count, of the window and of the baseline, so that a bin may be empty.
PRIOR = 0.5
SCALE_QUANTILE = 0.99
# Windows that are simulated at once, to bound the memory.
CHUNK = 1000

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def psi(reference: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return the population stability index [...] of counts [..., B].

    It is the sum over bins of (p - q) ln(p / q), for fractions p of the reference and q of the
    window.
    """
    p, q = _shares(reference), _shares(window)
    result: np.ndarray = ((p - q) * np.log(p / q)).sum(axis=-1)
    return result


def ks(reference: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return the two-sample Kolmogorov-Smirnov statistic [...] of counts [..., B].

    The bins must be in the order of their values.
    """
    difference = _plain_shares(reference).cumsum(axis=-1) - _plain_shares(window).cumsum(axis=-1)
    result: np.ndarray = np.abs(difference).max(axis=-1)
    return result


# Statistics by kind of quantity. For an embedding, the largest value over its dimensions counts.
STATISTICS: dict[str, dict[str, Statistic]] = {
    "number": {"psi": psi, "ks": ks},
    "category": {"psi": psi},
    "embedding": {"ks": ks},
}


@dataclass(frozen=True)
class Thresholds:
    """Alarm thresholds for windows of `rows` rows.

    of: thresholds by name of the quantity and name of the statistic.
    """

    rows: int
    of: dict[str, dict[str, float]]


def draw_thresholds(
    quantities: Mapping[str, Quantity], rows: int, alarm_rate: float, seed: int = 0
) -> Thresholds:
    """Return thresholds from simulated windows of `rows` rows.

    quantities: the baseline, by name. alarm_rate: fraction of windows with any false alarm.
    """
    generator = np.random.default_rng(seed)
    drawn = {
        (name, statistic): values
        for name, quantity in quantities.items()
        for statistic, values in _drawn(quantity, rows, generator).items()
    }
    if not drawn:
        return Thresholds(rows, {})
    scales = {key: float(np.quantile(values, SCALE_QUANTILE)) for key, values in drawn.items()}
    largest = np.max([values / (scales[key] or 1.0) for key, values in drawn.items()], axis=0)
    factor = float(np.quantile(largest, 1 - alarm_rate, method="higher"))
    of: dict[str, dict[str, float]] = {}
    for (name, statistic), scale in scales.items():
        of.setdefault(name, {})[statistic] = factor * (scale or 1.0)
    return Thresholds(rows, of)


def drift_scores(quantity: Quantity, window: np.ndarray) -> dict[str, float]:
    """Return each statistic of a window's counts, by name.

    window: int [B], or [D, B] for an embedding, as `quantity.counts`.
    """
    return {
        name: float(np.max(statistic(quantity.counts, window)))
        for name, statistic in STATISTICS[quantity.kind].items()
    }


def bin_fractions(counts: np.ndarray) -> list[Any]:
    """Return the fractions of counts [..., B] over the last axis, as nested lists."""
    return np.round(_plain_shares(counts), 5).tolist()


def _drawn(quantity: Quantity, rows: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return statistics of windows that differ from the baseline only by chance, [NUM_DRAWS]."""
    statistics = STATISTICS[quantity.kind]
    result = {name: np.zeros(NUM_DRAWS) for name in statistics}
    for counts_B in np.atleast_2d(quantity.counts):
        shares_B = _shares(counts_B)
        for start in range(0, NUM_DRAWS, CHUNK):
            reference = generator.multinomial(counts_B.sum(), shares_B, size=CHUNK)
            window = generator.multinomial(rows, shares_B, size=CHUNK)
            for name, statistic in statistics.items():
                part = result[name][start : start + CHUNK]
                np.maximum(part, statistic(reference, window), out=part)
    return result


def _shares(counts: np.ndarray) -> np.ndarray:
    return _plain_shares(counts + PRIOR)


def _plain_shares(counts: np.ndarray) -> np.ndarray:
    result: np.ndarray = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-12)
    return result
