"""Drift: how far the counts of a window are from the baseline's, and how far chance takes them.

A window of n records is compared with m held-out ones. If nothing has changed both are draws from
one distribution; so are pairs that are drawn from the baseline, and what their statistics reach is
the threshold. All statistics of a model share one false-alarm rate: the threshold of each is its
own 99th percentile times a factor, the same for all, that the largest of them passes in as many
drawn windows as false alarms are accepted. Statistics are drawn as if independent of each other;
where they are not, there are fewer false alarms than that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.bundle.feature_statistics import Quantity

NUM_DRAWS = 10_000
# Of a count, added on both sides, so that a bin may be empty.
PRIOR = 0.5
SCALE_QUANTILE = 0.99
# Windows that are drawn at once: what they take is bounded.
CHUNK = 1000

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def psi(reference: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Population stability index [...] of counts [..., B]: the sum of (p - q) ln(p / q)."""
    p, q = _shares(reference), _shares(window)
    result: np.ndarray = ((p - q) * np.log(p / q)).sum(axis=-1)
    return result


def ks(reference: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Two-sample Kolmogorov-Smirnov statistic [...] of counts [..., B] of ordered bins."""
    difference = _plain_shares(reference).cumsum(axis=-1) - _plain_shares(window).cumsum(axis=-1)
    result: np.ndarray = np.abs(difference).max(axis=-1)
    return result


# Of an embedding, the largest over its dimensions.
STATISTICS: dict[str, dict[str, Statistic]] = {
    "number": {"psi": psi, "ks": ks},
    "category": {"psi": psi},
    "embedding": {"ks": ks},
}


@dataclass(frozen=True)
class Thresholds:
    """What each statistic must pass to be an alarm, by quantity and name; for windows of `rows`."""

    rows: int
    of: dict[str, dict[str, float]]


def draw_thresholds(
    quantities: Mapping[str, Quantity], rows: int, alarm_rate: float, seed: int = 0
) -> Thresholds:
    """Draw windows from the baseline. alarm_rate: share of windows with any false alarm."""
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
    """Each statistic of a window's counts."""
    return {
        name: float(np.max(statistic(quantity.counts, window)))
        for name, statistic in STATISTICS[quantity.kind].items()
    }


def bin_fractions(counts: np.ndarray) -> list[Any]:
    return np.round(_plain_shares(counts), 5).tolist()


def _drawn(quantity: Quantity, rows: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Statistics of windows that differ from the baseline by chance only, [NUM_DRAWS] each."""
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
