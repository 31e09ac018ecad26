"""Aggregates the reports of all replicas: drift windows, live metrics, metrics of a rollout.

Reports are matched by version and request id and ordered by arrival, so replicas' clocks do not
matter.
"""

import asyncio
import logging
from collections.abc import Container
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from serve.config import ServeConfig
from serve.drift.sampler import Block
from serve.drift.windows import DriftMonitor
from serve.rollout import verdict as verdicts
from serve.rollout.feedback import FeedbackStore, LiveMetric, Prediction
from serve.rollout.monitor_state import LiveFeedback, MonitorState, VersionState
from serve.rollout.verdict import ArmComparison, LabelEvidence, RolloutVerdict
from serve.state import Rollout
from serve.telemetry.metrics import Snapshot, merge_samples
from train.bundle import Bundle
from train.tasks import ClassTarget, LabelsTarget

logger = logging.getLogger(__name__)


@dataclass
class ReplicaReport:
    """Observations of a replica since its last report.

    blocks: drift statistics, by version. predictions: (request id, version, predictions) of the
    requests that accept feedback. comparison: requests of a rollout; None without a rollout.
    """

    blocks: dict[str, list[Block]] = field(default_factory=dict)
    predictions: list[tuple[str, str, list[Prediction]]] = field(default_factory=list)
    comparison: ArmComparison | None = None

    def is_empty(self) -> bool:
        return not (any(self.blocks.values()) or self.predictions or self.comparison)


@dataclass(frozen=True)
class MonitoredVersion:
    """A version that is monitored.

    windows: None without drift monitoring. expected: metrics on the test split, by name.
    """

    windows: DriftMonitor | None
    expected: dict[str, float]


class MetricsAggregator:
    """Drift windows, feedback and rollout metrics of one model. Belongs to one event loop.

    started: set once a version is monitored. feedback: None before that.
    """

    def __init__(self, config: ServeConfig, name: str) -> None:
        self._config, self._name = config, name
        self._monitored: dict[str, MonitoredVersion] = {}
        self.started = asyncio.Event()
        self.feedback: FeedbackStore | None = None
        self._collected = asyncio.Event()
        self._classes = True
        self._comparison: ArmComparison | None = None
        # Evidence from labels in this phase; None before the phase is first judged.
        self._labels: LabelEvidence | None = None

    def monitor(self, version: str, monitored: MonitoredVersion, bundle: Bundle) -> None:
        """Start to aggregate the reports of a version."""
        self._monitored[version] = monitored
        target = bundle.task.target
        if self.feedback is None:
            self.feedback = FeedbackStore(target)
            self._classes = isinstance(target, ClassTarget | LabelsTarget)
        self.started.set()

    def retain(self, served: Container[str]) -> None:
        """Drop versions that are no longer served, because their alarms would never end."""
        self._monitored = {
            version: monitored
            for version, monitored in self._monitored.items()
            if version in served
        }

    def is_monitored(self, version: str) -> bool:
        return version in self._monitored

    def collect(self, report: ReplicaReport) -> bool:
        """Add a replica's report; return whether it completed a drift window."""
        closed = False
        for version, blocks in report.blocks.items():
            monitored = self._monitored.get(version)
            if monitored is None or monitored.windows is None:
                continue
            for block in blocks:
                window = monitored.windows.add(block)
                closed |= window is not None
                if window is not None and window.alarms:
                    names = sorted({alarm.feature for alarm in window.alarms})
                    logger.warning("%s version %s: drift in %s", self._name, version, names)
        if self.feedback is not None:
            for predicted in report.predictions:
                self.feedback.predicted(*predicted)
        new, known = report.comparison, self._comparison
        if new is not None and known is not None and new.candidate == known.candidate:
            known.add(new)
        self._collected.set()
        self._collected = asyncio.Event()
        return closed

    async def next_report(self) -> None:
        """Wait until another report has been collected."""
        await self._collected.wait()

    def begin(self, candidate: str) -> None:
        """Start to compare a candidate with production."""
        self._comparison = ArmComparison(candidate)
        self._labels = None

    def compares(self, candidate: str) -> bool:
        """Return whether a candidate is being compared with production."""
        return self._comparison is not None and self._comparison.candidate == candidate

    def judge(self, production: str) -> RolloutVerdict | None:
        """Return the verdict on the candidate; None while there is too little evidence."""
        if self._comparison is None or self.feedback is None:
            return None
        if self._labels is None:
            self._labels = LabelEvidence(self._config.rollout, classes=self._classes)
        for losses in self.feedback.take_losses(production, self._comparison.candidate):
            self._labels.add(*losses)
        return verdicts.judge_rollout(self._comparison, self._labels, self._config.rollout)

    def rollout_metrics(self, production: str, rollout: Rollout) -> dict[str, Any] | None:
        """Return the metrics of both arms; None before the comparison begins."""
        if self._comparison is None:
            return None
        live = {
            "production": self._live(production),
            "candidate": self._live(self._comparison.candidate),
        }
        return verdicts.rollout_metrics(self._comparison, rollout, live)

    def end(self) -> None:
        """End the comparison."""
        self._comparison = None

    def _live(self, version: str) -> LiveMetric | None:
        return None if self.feedback is None else self.feedback.live(version)

    def _live_and_expected(self, version: str) -> dict[str, Any] | None:
        """Return a version's live metric, together with its value on the test split."""
        live = self._live(version)
        if live is None:
            return None
        expected = self._monitored[version].expected.get(f"test_{live.metric}")
        return {**live.to_dict(), "expected": expected}

    def stats(self) -> dict[str, Any]:
        """Return the statistics of each version, as in the response of `/stats`."""
        return {
            version: {
                **({"windows": []} if monitored.windows is None else monitored.windows.to_dict()),
                "feedback": self._live_and_expected(version),
            }
            for version, monitored in self._monitored.items()
        }

    def state(self, production: str) -> MonitorState:
        """Return the state that `serve.retrain` reads."""
        versions = {}
        for version, monitored in self._monitored.items():
            windows = () if monitored.windows is None else tuple(monitored.windows.full)
            live = self._live_and_expected(version)
            feedback = None if live is None else LiveFeedback(**live)
            versions[version] = VersionState(windows=windows, feedback=feedback)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return MonitorState(time=now, production=production, versions=versions)

    def snapshot(self) -> Snapshot:
        """Return drift and live metrics in the form of Prometheus."""
        parts: list[Snapshot] = []
        for version, monitored in self._monitored.items():
            labels = {"model": self._name, "version": version}
            if monitored.windows is not None:
                parts.append(monitored.windows.snapshot(labels))
            live = self._live(version)
            if live is not None:
                parts.append(_live_samples(live, labels))
        return merge_samples(parts)


def load_monitored(location: str, config: ServeConfig) -> tuple[MonitoredVersion, Bundle]:
    """Load a bundle and prepare its drift monitoring; takes about a second.

    Raises CorruptBundle if the bundle is damaged.
    """
    bundle = Bundle.load(location)
    quantities = bundle.quantities
    windows = None
    if quantities and config.drift.rows_per_s:
        windows = DriftMonitor(quantities, config.drift.window_rows, config.drift.alarm_rate)
    manifest = bundle.manifest
    variant = config.variant or manifest.default_variant
    return MonitoredVersion(windows, manifest.variants[variant].metrics), bundle


def _live_samples(live: LiveMetric, labels: dict[str, str]) -> Snapshot:
    def sample(end: str, value: float) -> tuple[str, dict[str, str], float]:
        return ("", {**labels, "end": end}, value)

    ends = [sample("value", live.value), sample("low", live.low), sample("high", live.high)]
    count = ("", labels, float(live.count))
    return {
        f"live_{live.metric}": (
            "gauge",
            "Metric on recent feedback, with the ends of its 95 % interval.",
            ends,
        ),
        "live_records": ("gauge", "Records with recent feedback.", [count]),
    }
