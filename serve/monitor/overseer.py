"""The overseer: what all replicas saw of a model, put together. A part of the repository.

Replicas report counts, predictions and comparisons; here they become windows, live accuracy and
the figures of a rollout. Nothing depends on clocks of replicas: things belong together by version
and request id, and the order is that of arrival.
"""

import json
import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cluster import storage
from serve.config import ServeConfig
from serve.metrics import Snapshot, merged
from serve.monitor import rollout
from serve.monitor.feedback import Feedback, Live, Prediction
from serve.monitor.rollout import Comparison, Rules, Verdict
from serve.monitor.sampler import Block
from serve.monitor.windows import Windows
from train.bundle import Bundle
from train.tasks import ClassTarget, LabelsTarget

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What a replica saw since its last report.

    blocks: counts, by version. answered: (request id, version, predictions) of what takes feedback.
    """

    blocks: dict[str, list[Block]] = field(default_factory=dict)
    answered: list[tuple[str, str, list[Prediction]]] = field(default_factory=list)
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Watched:
    """A version that is looked after. expected: its figures of the test split."""

    windows: Windows | None
    expected: dict[str, float]


def place(root: str, name: str) -> str:
    """Where under the storage path the monitor's state of a model is."""
    return storage.join(root, "monitor", f"{name}.json")


class Overseer:
    """Belongs to one event loop."""

    def __init__(self, config: ServeConfig, name: str) -> None:
        self._config, self._name = config, name
        self._rules = Rules(config.rollout_labelled, config.rollout_margin, config.rollout_latency)
        self._watched: dict[str, Watched] = {}
        self.feedback: Feedback | None = None
        self._classes = True
        self._comparison: Comparison | None = None
        # Labelled records before accuracy is judged next: looking at every one would find chance.
        self._next_look = config.rollout_labelled

    def watch(self, version: str, watched: Watched, bundle: Bundle) -> None:
        self._watched[version] = watched
        target = bundle.task.target
        if self.feedback is None:
            self.feedback = Feedback(target)
            self._classes = isinstance(target, ClassTarget | LabelsTarget)

    def forget(self, served: Container[str]) -> None:
        """Drop what is not served any more: an alarm of it would never end."""
        self._watched = {
            version: watched for version, watched in self._watched.items() if version in served
        }

    def watches(self, version: str) -> bool:
        return version in self._watched

    def report(self, report: Report) -> bool:
        """Take a replica's report; return whether a window was full."""
        closed = False
        for version, blocks in report.blocks.items():
            watched = self._watched.get(version)
            if watched is None or watched.windows is None:
                continue
            for block in blocks:
                window = watched.windows.add(block)
                closed |= window is not None
                if window is not None and window.alarms:
                    names = sorted({alarm.feature for alarm in window.alarms})
                    logger.warning("%s version %s drifts: %s", self._name, version, names)
        if self.feedback is not None:
            for answer in report.answered:
                self.feedback.predicted(*answer)
        told, known = report.comparison, self._comparison
        if told is not None and known is not None and told.candidate == known.candidate:
            known.add(told)
        return closed

    def begin(self, candidate: str) -> None:
        """Compare a candidate with production, from now on."""
        self._comparison = Comparison(candidate)
        self._next_look = self._config.rollout_labelled

    def judge(self, production: str) -> Verdict | None:
        """What is to be done with the candidate; None: nothing yet."""
        if self._comparison is None:
            return None
        losses = np.zeros((0, 2))
        if self.feedback is not None:
            losses = self.feedback.pairs(production, self._comparison.candidate)
        if len(losses) < self._next_look:
            losses = losses[:0]
        else:
            self._next_look = 2 * len(losses)
        return rollout.judge(self._comparison, losses, self._rules, classes=self._classes)

    def figures(self, production: str, phase: str, share: float) -> dict[str, Any] | None:
        if self._comparison is None:
            return None
        live = {
            "production": self._live(production),
            "candidate": self._live(self._comparison.candidate),
        }
        return rollout.figures(self._comparison, phase, share, live)

    def end(self) -> None:
        self._comparison = None

    def _live(self, version: str) -> Live | None:
        return None if self.feedback is None else self.feedback.live(version)

    def _told(self, version: str) -> dict[str, Any] | None:
        """Live figures of a version, with what its test split promised."""
        live = self._live(version)
        if live is None:
            return None
        expected = self._watched[version].expected.get(f"test_{live.metric}")
        return {**live.to_dict(), "expected": expected}

    def stats(self) -> dict[str, Any]:
        """What `/stats` tells of each version."""
        return {
            version: {
                **(watched.windows.to_dict() if watched.windows is not None else {"windows": []}),
                "feedback": self._told(version),
            }
            for version, watched in self._watched.items()
        }

    def state(self, production: str) -> dict[str, Any]:
        """What is kept for `serve.monitor.retrain`."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "production": production,
            "versions": {
                version: {
                    "windows": watched.windows.summary() if watched.windows is not None else [],
                    "feedback": self._told(version),
                }
                for version, watched in self._watched.items()
            },
        }

    def snapshot(self) -> Snapshot:
        """Drift and live figures as metrics."""
        parts: list[Snapshot] = []
        for version, watched in self._watched.items():
            labels = {"model": self._name, "version": version}
            if watched.windows is not None:
                parts.append(watched.windows.snapshot(labels))
            live = self._live(version)
            if live is not None:
                parts.append(_live_samples(live, labels))
        return merged(parts)


def find(location: str, config: ServeConfig) -> tuple[Watched, Bundle]:
    """Read what a version is watched by; takes about a second. Raises CorruptBundle."""
    bundle = Bundle.load(location)
    found = bundle.quantities
    windows = None
    if found and config.monitor_rows_per_s:
        windows = Windows(found, config.drift_window, config.drift_alarm_rate)
    manifest = bundle.manifest
    variant = config.variant or manifest.default_variant
    return Watched(windows, manifest.variants[variant].metrics), bundle


def keep(root: str, name: str, state: Mapping[str, Any]) -> None:
    """Write the monitor's state, whole. Raises OSError."""
    storage.write_file(place(root, name), json.dumps(state, indent=1).encode())


def _live_samples(live: Live, labels: dict[str, str]) -> Snapshot:
    def sample(end: str, value: float) -> tuple[str, dict[str, str], float]:
        return ("", {**labels, "end": end}, value)

    ends = [sample("value", live.value), sample("low", live.low), sample("high", live.high)]
    words = f"{live.metric} of recent feedback with its 95 % interval."
    return {
        f"live_{live.metric}": ("gauge", words.capitalize(), ends),
        "live_records": ("gauge", "Records of recent feedback.", [("", labels, float(live.count))]),
    }
