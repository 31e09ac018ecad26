"""The rules of a rollout: when a candidate is promoted, and when it is rolled back.

In the shadow phase the candidate gets copies of requests, and its responses are compared but never
returned. In the canary phase it answers some clients, always the same ones; if it fails, production
answers instead.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from serve.config import RolloutOptions
from serve.rollout.feedback import LiveMetric
from serve.state import Rollout
from serve.telemetry.metrics import SECONDS, Histogram
from train.stats import paired_interval, sign_test

Phase = Literal["shadow", "canary"]
SHADOW, CANARY = "shadow", "canary"
PROMOTED, ROLLED_BACK, REFUSED = "promoted", "rolled back", "refused"
# Latency is judged from this number of requests on.
LEAST_REQUESTS = 200
# Errors that may be a coincidence, and the fraction of requests above which they are not.
FEW_ERRORS, MAX_ERRORS = 3, 0.01


@dataclass
class ArmStats:
    """Requests of one version, its failures, and a histogram of latencies in seconds."""

    requests: int = 0
    errors: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def answered(self, seconds: float) -> None:
        self.requests += 1
        self.seconds.observe(seconds)

    def failed(self) -> None:
        self.requests += 1
        self.errors += 1

    def add(self, other: "ArmStats") -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.seconds.add(other.seconds)

    def to_dict(self) -> dict[str, Any]:
        def ms(quantile: float) -> float | None:
            return round(self.seconds.quantile(quantile) * 1e3, 3) if self.seconds.count else None

        return {
            "requests": self.requests,
            "errors": self.errors,
            "p50_ms": ms(0.5),
            "p95_ms": ms(0.95),
        }


@dataclass
class ArmComparison:
    """A candidate compared with production. rows: rows that both answered.

    agreed: those of them with the same label, or nearly the same value.
    """

    candidate: str
    rows: int = 0
    agreed: int = 0
    arms: dict[str, ArmStats] = field(
        default_factory=lambda: {"production": ArmStats(), "candidate": ArmStats()}
    )

    def add(self, other: "ArmComparison") -> None:
        self.rows += other.rows
        self.agreed += other.agreed
        for name, arm in other.arms.items():
            self.arms[name].add(arm)


@dataclass(frozen=True)
class RolloutDecision:
    """time: UTC, ISO 8601. production: the version that `version` was compared with.

    figures: the metrics it was decided by.
    """

    time: str
    version: str
    production: str
    decision: str
    reason: str
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RolloutVerdict:
    """decision: PROMOTED, ROLLED_BACK or REFUSED."""

    decision: str
    reason: str


def judge_rollout(
    comparison: ArmComparison, losses: np.ndarray, rules: RolloutOptions, *, classes: bool
) -> RolloutVerdict | None:
    """Decide whether to promote a candidate or to roll it back; None while undecided.

    losses: [P, 2] of production and the candidate for the same labelled rows; classes: whether a
    loss is 1 for a wrong class, else it is a squared error.
    """
    production, candidate = comparison.arms["production"], comparison.arms["candidate"]
    allowed = max(FEW_ERRORS, MAX_ERRORS * candidate.requests)
    if candidate.errors >= allowed:
        return RolloutVerdict(
            ROLLED_BACK, f"it failed for {candidate.errors} of {candidate.requests} requests"
        )
    if min(production.seconds.count, candidate.seconds.count) >= LEAST_REQUESTS:
        before, after = (arm.seconds.quantile(0.95) * 1e3 for arm in (production, candidate))
        if after > rules.max_latency_ratio * before:
            return RolloutVerdict(
                ROLLED_BACK, f"its 95th percentile is {after:.2f} ms against {before:.2f} ms"
            )
    if len(losses) < rules.min_labels:
        return None
    production_P, candidate_P = losses.T
    gain = float((production_P - candidate_P).mean())
    low, high = paired_interval(candidate_P, production_P, binary=classes)
    p = sign_test(int((candidate_P < production_P).sum()), int((candidate_P > production_P).sum()))
    unit = 1.0 if classes else max(float(losses[:, 0].mean()), 1e-12)
    what = "accuracy" if classes else "mean squared error, as a share of it"
    figures = (
        f"{what}: better by {gain / unit:+.4f}, 95 % interval {low / unit:+.4f} to "
        f"{high / unit:+.4f}, p = {p:.2g}, of {len(losses)} labelled records"
    )
    if high < 0:
        return RolloutVerdict(ROLLED_BACK, figures)
    # Twice the margin in the error is about the margin in its root.
    margin = rules.noninferiority_margin if classes else 2 * rules.noninferiority_margin
    if low > -margin * unit:
        return RolloutVerdict(PROMOTED, figures)
    return None


def rollout_metrics(
    comparison: ArmComparison, rollout: Rollout, live: Mapping[str, LiveMetric | None]
) -> dict[str, Any]:
    """Return the metrics in `/stats` and the registry. live: by "production" and "candidate"."""
    arms = {
        name: arm.to_dict() | _accuracy(live.get(name)) for name, arm in comparison.arms.items()
    }
    return {
        "candidate": comparison.candidate,
        "phase": rollout.phase,
        "share": rollout.fraction,
        "compared": comparison.rows,
        "agreement": comparison.agreed / comparison.rows if comparison.rows else None,
        "production": arms["production"],
        "candidate_figures": arms["candidate"],
    }


def _accuracy(live: LiveMetric | None) -> dict[str, Any]:
    if live is None:
        return {}
    return {live.metric: live.value, "low": live.low, "high": live.high, "labelled": live.count}
