"""Windows: blocks of all replicas, put together and compared with the baseline. One per version."""

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

# Windows that are remembered.
MAX_WINDOWS = 50


@dataclass(frozen=True)
class DriftAlarm:
    """A statistic of a quantity that passed its threshold."""

    feature: str
    statistic: str
    score: float
    threshold: float


@dataclass(frozen=True)
class DriftWindow:
    """One that was full. time: UTC, ISO 8601."""

    rows: int
    time: str
    alarms: tuple[DriftAlarm, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "time": self.time, "alarms": [asdict(a) for a in self.alarms]}


class DriftMonitor:
    """What one version's traffic looks like."""

    def __init__(
        self,
        quantities: Mapping[str, Quantity],
        rows: int,
        alarm_rate: float,
        thresholds: Thresholds | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """rows: of a window, a multiple of BLOCK_ROWS. thresholds: drawn anew when None."""
        assert rows % BLOCK_ROWS == 0
        self._quantities = dict(quantities)
        self._size = rows
        self._thresholds = thresholds or draw_thresholds(quantities, rows, alarm_rate)
        self._clock = clock
        self._counts: dict[str, np.ndarray] = self._none()
        self._rows = 0
        # Of the last full window: counts and scores.
        self._last: dict[str, np.ndarray] = {}
        self._scores: dict[str, dict[str, float]] = {}
        self.full: deque[DriftWindow] = deque(maxlen=MAX_WINDOWS)
        self.num_full = self.num_alarmed = 0

    def add(self, block: Block) -> DriftWindow | None:
        """Return the window that a block of BLOCK_ROWS rows makes full."""
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
        """The last windows, the oldest first."""
        return [window.to_dict() for window in self.full]

    def to_dict(self) -> dict[str, Any]:
        """What `/stats` tells: windows, and each quantity of the last full one."""
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
        """Scores of the last full window as metrics.

        Of each quantity the statistic that is nearest to its threshold, or furthest beyond.
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
                "How far the last window is from the baseline.",
                each({name: score for name, (score, _) in worst.items()}),
            ),
            "drift_threshold": (
                "gauge",
                "Score above which the last window has drifted.",
                each({name: threshold for name, (_, threshold) in worst.items()}),
            ),
            "drift_windows": (
                "counter",
                "Windows that were compared with the baseline.",
                [("_total", labels, float(self.num_full))],
            ),
            "drift_alarmed_windows": (
                "counter",
                "Windows that had drifted.",
                [("_total", labels, float(self.num_alarmed))],
            ),
            "missing_ratio": (
                "gauge",
                "Share of the last window whose value is missing.",
                each(of("missing")),
            ),
            "out_of_range_ratio": (
                "gauge",
                "Share of the last window beyond the values, or the names, that training saw.",
                each(of("out_of_range")),
            ),
        }


def _rates(quantity: Quantity, counts: np.ndarray) -> dict[str, float]:
    """Shares of what is missing, and of what training never saw."""
    total = max(int(counts.sum()), 1)
    if quantity.kind == "number":
        outside = int(counts[1] + counts[-1])
        return {"missing": int(counts[0]) / total, "out_of_range": outside / total}
    if quantity.labels[:2] == (UNSEEN_NAME, MISSING_NAME):
        return {"missing": int(counts[1]) / total, "out_of_range": int(counts[0]) / total}
    return {}
