"""Drift windows: blocks of all replicas, added up and compared with the baseline, per version."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from serve.drift.sampler import BLOCK_ROWS, Block
from serve.drift.statistics import Thresholds, bin_fractions, draw_thresholds, drift_scores
from serve.telemetry.metrics import Snapshot
from train.bundle.feature_statistics import MISSING_NAME, UNSEEN_NAME, Quantity

logger = logging.getLogger(__name__)

# Latest windows that are kept.
MAX_WINDOWS = 50


@dataclass(frozen=True)
class DriftAlarm:
    """A statistic that exceeded its threshold. feature: name of the quantity."""

    feature: str
    statistic: str
    score: float
    threshold: float


@dataclass(frozen=True)
class DriftWindow:
    """A complete window. time: when it was completed, UTC, ISO 8601."""

    rows: int
    time: str
    alarms: tuple[DriftAlarm, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the window as JSON objects."""
        return {"rows": self.rows, "time": self.time, "alarms": [asdict(a) for a in self.alarms]}


class DriftMonitor:
    """Drift monitoring of one version, over the traffic of all replicas.

    full: the latest complete windows. num_full: number of all complete windows. num_alarmed: number
    of those with alarms.
    """

    def __init__(
        self,
        quantities: Mapping[str, Quantity],
        rows: int,
        alarm_rate: float,
        thresholds: Thresholds | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """quantities: the baseline, by name. rows: rows per window, a multiple of BLOCK_ROWS.

        thresholds: simulated with `alarm_rate` if None.
        """
        assert rows % BLOCK_ROWS == 0
        self._quantities = dict(quantities)
        self._size = rows
        self._thresholds = thresholds or draw_thresholds(quantities, rows, alarm_rate)
        self._clock = clock
        self._counts: dict[str, np.ndarray] = self._none()
        self._rows = 0
        # Counts and scores of the last complete window.
        self._last: dict[str, np.ndarray] = {}
        self._scores: dict[str, dict[str, float]] = {}
        self.full: deque[DriftWindow] = deque(maxlen=MAX_WINDOWS)
        self.num_full = self.num_alarmed = 0

    def add(self, block: Block) -> DriftWindow | None:
        """Add a block of BLOCK_ROWS rows; return the window if this completes one."""
        for name, counts in block.items():
            if name in self._counts:
                self._counts[name] += counts
        self._rows += BLOCK_ROWS
        return self._close() if self._rows >= self._size else None

    def _close(self) -> DriftWindow:
        self._last = self._counts
        self._scores = {
            name: drift_scores(quantity, self._last[name])
            for name, quantity in self._quantities.items()
        }
        alarms = tuple(
            DriftAlarm(name, statistic, round(score, 5), round(threshold, 5))
            for name, statistics in self._thresholds.of.items()
            for statistic, threshold in statistics.items()
            if (score := self._scores[name][statistic]) > threshold
        )
        now = datetime.fromtimestamp(self._clock(), UTC)
        window = DriftWindow(self._rows, now.isoformat(timespec="seconds"), alarms)
        self._counts, self._rows = self._none(), 0
        self.full.append(window)
        self.num_full += 1
        self.num_alarmed += bool(alarms)
        return window

    def _none(self) -> dict[str, np.ndarray]:
        return {name: np.zeros_like(each.counts) for name, each in self._quantities.items()}

    def summary(self) -> list[dict[str, Any]]:
        """Return the latest windows, oldest first."""
        return [window.to_dict() for window in self.full]

    def to_dict(self) -> dict[str, Any]:
        """Return the windows, and each quantity of the last one, for the response of `/stats`."""
        return {
            "windows": self.summary(),
            "current": {"rows": self._rows, "of": self._size},
            "features": {name: self._feature(name) for name in self._scores},
        }

    def _feature(self, name: str) -> dict[str, Any]:
        quantity, counts = self._quantities[name], self._last[name]
        bins = {"labels": quantity.labels} if quantity.labels else {"edges": quantity.edges}
        return {
            "statistics": {
                statistic: {"score": score, "threshold": self._thresholds.of[name][statistic]}
                for statistic, score in self._scores[name].items()
            },
            **_rates(quantity, counts),
            **bins,
            "reference": bin_fractions(quantity.counts),
            "window": bin_fractions(counts),
        }

    def snapshot(self, labels: dict[str, str]) -> Snapshot:
        """Return the scores of the last complete window as metrics. labels: of every sample.

        Each quantity is represented by the statistic with the largest ratio of score to threshold.
        """
        worst = {
            name: max(
                (
                    (score, self._thresholds.of[name][statistic])
                    for statistic, score in found.items()
                ),
                key=lambda pair: pair[0] / pair[1],
            )
            for name, found in self._scores.items()
        }
        rates = {name: _rates(self._quantities[name], self._last[name]) for name in self._scores}

        def each(values: Mapping[str, float]) -> list[tuple[str, dict[str, str], float]]:
            return [("", {**labels, "feature": name}, value) for name, value in values.items()]

        def of(rate: str) -> dict[str, float]:
            return {name: found[rate] for name, found in rates.items() if rate in found}

        return {
            "drift_score": (
                "gauge",
                "Distance of the last window from the baseline.",
                each({name: score for name, (score, _) in worst.items()}),
            ),
            "drift_threshold": (
                "gauge",
                "Score above which the last window counts as drifted.",
                each({name: threshold for name, (_, threshold) in worst.items()}),
            ),
            "drift_windows": (
                "counter",
                "Windows compared with the baseline.",
                [("_total", labels, float(self.num_full))],
            ),
            "drift_alarmed_windows": (
                "counter",
                "Windows with drift alarms.",
                [("_total", labels, float(self.num_alarmed))],
            ),
            "missing_ratio": (
                "gauge",
                "Fraction of missing values in the last window.",
                each(of("missing")),
            ),
            "out_of_range_ratio": (
                "gauge",
                "Fraction of values in the last window outside the training range or names.",
                each(of("out_of_range")),
            ),
        }


def _rates(quantity: Quantity, counts: np.ndarray) -> dict[str, float]:
    """Return the fractions of missing values and of values that training did not contain."""
    total = max(int(counts.sum()), 1)
    if quantity.kind == "number":
        outside = int(counts[1] + counts[-1])
        return {"missing": int(counts[0]) / total, "out_of_range": outside / total}
    if quantity.labels[:2] == (UNSEEN_NAME, MISSING_NAME):
        return {"missing": int(counts[1]) / total, "out_of_range": int(counts[0]) / total}
    return {}
