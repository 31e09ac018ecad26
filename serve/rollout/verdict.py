"""The rules of a rollout: when a candidate is promoted and when it is rolled back.

In the shadow phase the candidate receives copies of requests; its responses are compared but never
returned. In the canary phase it answers a fixed set of clients; if it fails, production answers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from serve.config import RolloutOptions
from serve.rollout.feedback import LiveMetric
from serve.rollout.latency_sketch import LatencySketch
from serve.state import Rollout
from train.stats import BoundedMeanEvidence, MeanEvidence, binomial_evidence

Phase = Literal["shadow", "canary"]
SHADOW, CANARY = "shadow", "canary"
PROMOTED, ROLLED_BACK, REFUSED = "promoted", "rolled back", "refused"
# Probability of each kind of wrong decision in a phase, however often the rules are evaluated.
ALPHA = 0.025
# Errors below this number are ignored; largest accepted fraction of failed requests.
FEW_ERRORS, MAX_ERRORS = 3, 0.01
JUDGED_QUANTILE = 0.95


@dataclass
class ArmStats:
    """Requests, failures and response latencies of one version in a rollout."""

    requests: int = 0
    errors: int = 0
    latency: LatencySketch = field(default_factory=LatencySketch)

    def answered(self, seconds: float) -> None:
        """Count a response and its latency."""
        self.requests += 1
        self.latency.observe(seconds)

    def failed(self) -> None:
        """Count a failed request."""
        self.requests += 1
        self.errors += 1

    def add(self, other: "ArmStats") -> None:
        """Add the counts and latencies of another replica."""
        self.requests += other.requests
        self.errors += other.errors
        self.latency.add(other.latency)

    def to_dict(self) -> dict[str, Any]:
        def ms(quantile: float) -> float | None:
            return round(self.latency.quantile(quantile) * 1e3, 3) if self.latency.count else None

        return {
            "requests": self.requests,
            "errors": self.errors,
            "p50_ms": ms(0.5),
            "p95_ms": ms(0.95),
        }


@dataclass
class ArmComparison:
    """A candidate compared with production.

    rows: rows that both answered. agreed: rows with the same label or nearly the same value.
    """

    candidate: str
    rows: int = 0
    agreed: int = 0
    arms: dict[str, ArmStats] = field(
        default_factory=lambda: {"production": ArmStats(), "candidate": ArmStats()}
    )

    def add(self, other: "ArmComparison") -> None:
        """Add the comparison of another replica."""
        self.rows += other.rows
        self.agreed += other.agreed
        for name, arm in other.arms.items():
            self.arms[name].add(arm)


@dataclass(frozen=True)
class RolloutDecision:
    """The decision about a candidate, as it is stored in the registry.

    time: UTC, ISO 8601. production: the version that `version` was compared with. figures: metrics
    of both at the time of the decision.
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
    """The outcome of a phase. decision: PROMOTED, ROLLED_BACK or REFUSED."""

    decision: str
    reason: str


class LabelEvidence:
    """Evidence from labelled requests that a candidate is not worse by the margin, or is worse.

    A request counts once, with the mean loss of its records, because these may be correlated.
    """

    def __init__(self, rules: RolloutOptions, *, classes: bool) -> None:
        """classes: True if a loss is 1 for a wrong class, False if it is a squared error."""
        self._rules, self._classes = rules, classes
        self.requests = 0
        self._production: Any = np.float64(0)
        self._candidate: Any = np.float64(0)
        self._not_inferior: BoundedMeanEvidence | MeanEvidence
        self._worse: BoundedMeanEvidence | MeanEvidence
        if classes:
            # The gain, in -1..1, is mapped to (1 + gain) / 2, in 0..1.
            self._not_inferior = BoundedMeanEvidence((1 - rules.noninferiority_margin) / 2)
            self._worse = BoundedMeanEvidence(0.5)
        else:
            self._not_inferior = MeanEvidence(rules.min_labels)
            self._worse = MeanEvidence(rules.min_labels)

    def add(self, production: Any, candidate: Any) -> None:
        """Add a request with the mean loss of each version: scalars, or arrays for simulations."""
        self.requests += 1
        self._production = self._production + production
        self._candidate = self._candidate + candidate
        if self._classes:
            self._not_inferior.add((1 + production - candidate) / 2)
            self._worse.add((1 + candidate - production) / 2)
        else:
            # The margin refers to the RMSE, so it is squared for squared errors.
            allowed = (1 + self._rules.noninferiority_margin) ** 2
            self._not_inferior.add(allowed * production - candidate)
            self._worse.add(candidate - production)

    def evidence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the evidence that the candidate is not worse by the margin, and that it is worse.

        Both are e-values, float64 scalars, or of the shape of the arrays given to `add`.
        """
        return self._not_inferior.value, self._worse.value

    def judge(self) -> RolloutVerdict | None:
        """Decide by accuracy or RMSE alone; return None while there is too little evidence."""
        if self.requests < self._rules.min_labels:
            return None
        margin = self._rules.noninferiority_margin
        if self._classes:
            metric, gain = "accuracy", (self._production - self._candidate) / self.requests
            excluded = f"{margin:g} or more"
        else:
            metric = "relative RMSE"
            gain = 1 - math.sqrt(self._candidate / self._production) if self._production else 0.0
            excluded = f"{margin:.1%} or more"
        figures = f"{metric} gain {gain:+.4f} in {self.requests} labelled requests; the hypothesis"
        not_inferior, worse = map(float, self.evidence())
        if worse >= 1 / ALPHA:
            return RolloutVerdict(
                ROLLED_BACK, f"{figures} that it is not worse has p = {1 / worse:.2g}"
            )
        if not_inferior >= 1 / ALPHA:
            return RolloutVerdict(
                PROMOTED,
                f"{figures} that it is worse by {excluded} has p = {1 / not_inferior:.2g}",
            )
        return None


def judge_rollout(
    comparison: ArmComparison, labels: LabelEvidence, rules: RolloutOptions
) -> RolloutVerdict | None:
    """Decide whether to promote a candidate or to roll it back; return None while undecided.

    It may be called any number of times in a phase: each rule decides wrongly in at most `ALPHA` of
    the phases if requests are independent.
    """
    production, candidate = comparison.arms["production"], comparison.arms["candidate"]
    errors, requests = candidate.errors, candidate.requests
    if (
        errors >= max(FEW_ERRORS, MAX_ERRORS * requests)
        and binomial_evidence(errors, requests, MAX_ERRORS) >= 1 / ALPHA
    ):
        return RolloutVerdict(ROLLED_BACK, f"it failed for {errors} of {requests} requests")
    before, after = (
        arm.latency.sequential_interval(JUDGED_QUANTILE, ALPHA / 2)
        for arm in (production, candidate)
    )
    if after[0] > rules.max_latency_ratio * before[1]:
        return RolloutVerdict(
            ROLLED_BACK,
            f"its 95th percentile latency is {_ms(candidate, after)} against "
            f"{_ms(production, before)}",
        )
    return labels.judge()


def _ms(arm: ArmStats, interval: tuple[float, float]) -> str:
    low, high = (1e3 * end for end in interval)
    return f"{1e3 * arm.latency.quantile(JUDGED_QUANTILE):.2f} ms [{low:.2f}, {high:.2f}]"


def rollout_metrics(
    comparison: ArmComparison, rollout: Rollout, live: Mapping[str, LiveMetric | None]
) -> dict[str, Any]:
    """Return the metrics of a rollout, for `/stats` and the registry.

    live: live metrics of "production" and "candidate".
    """
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
