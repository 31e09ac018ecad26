"""Rollout: a candidate beside production, until figures say which of them is to serve.

In shadow it is given copies of requests, and its answers are compared but never returned. As canary
it answers some clients, always the same ones; where it fails, production answers instead.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from serve.metrics import SECONDS, Histogram
from serve.monitor.feedback import Live, Z
from serve.monitor.paired import sign_test

Phase = Literal["shadow", "canary"]
SHADOW, CANARY = "shadow", "canary"
PROMOTED, ROLLED_BACK, REFUSED = "promoted", "rolled back", "refused"
# Fewer requests tell nothing of latency.
LEAST_REQUESTS = 200
# Errors that may be a coincidence, and the share of requests above which more are none.
FEW_ERRORS, MAX_ERRORS = 3, 0.01


def chosen(key: str, share: float) -> bool:
    """Whether a key is among a share of all keys: always the same ones, and more as it grows."""
    digest = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass
class Side:
    """How one version fared: requests, failures, and how long they took, in seconds."""

    requests: int = 0
    errors: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def answered(self, seconds: float) -> None:
        self.requests += 1
        self.seconds.observe(seconds)

    def failed(self) -> None:
        self.requests += 1
        self.errors += 1

    def add(self, other: "Side") -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.seconds.add(other.seconds)

    def to_dict(self) -> dict[str, Any]:
        def ms(share: float) -> float | None:
            return round(self.seconds.quantile(share) * 1e3, 3) if self.seconds.count else None

        return {
            "requests": self.requests,
            "errors": self.errors,
            "p50_ms": ms(0.5),
            "p95_ms": ms(0.95),
        }


@dataclass
class Comparison:
    """What replicas saw of a candidate. rows: compared; agreed: with the same label, or nearly the
    same value."""

    candidate: str
    rows: int = 0
    agreed: int = 0
    sides: dict[str, Side] = field(
        default_factory=lambda: {"production": Side(), "candidate": Side()}
    )

    def add(self, other: "Comparison") -> None:
        self.rows += other.rows
        self.agreed += other.agreed
        for name, side in other.sides.items():
            self.sides[name].add(side)


@dataclass(frozen=True)
class Rules:
    """When a candidate is promoted or rolled back.

    least_labelled: rows with feedback that both versions answered, before accuracy is judged.
    margin: how much worse it may be for certain, in accuracy, or as a share of the RMSE.
    latency: how many times as long as production it may take, at the 95th percentile.
    """

    least_labelled: int
    margin: float
    latency: float


@dataclass(frozen=True)
class Decision:
    """time: UTC, ISO 8601. figures: what it was decided by."""

    time: str
    version: str
    decision: str
    reason: str
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a candidate, and why."""

    decision: str
    reason: str


def judge(
    comparison: Comparison, losses: np.ndarray, rules: Rules, *, classes: bool
) -> Verdict | None:
    """Say whether it is time to promote a candidate or to roll it back; None: not yet.

    losses: [P, 2] of production and the candidate for the same labelled rows; classes: whether a
    loss is 1 for a wrong class, else it is a squared error.
    """
    production, candidate = comparison.sides["production"], comparison.sides["candidate"]
    allowed = max(FEW_ERRORS, MAX_ERRORS * candidate.requests)
    if candidate.errors >= allowed:
        return Verdict(
            ROLLED_BACK, f"it failed for {candidate.errors} of {candidate.requests} requests"
        )
    if min(production.seconds.count, candidate.seconds.count) >= LEAST_REQUESTS:
        before, after = (side.seconds.quantile(0.95) * 1e3 for side in (production, candidate))
        if after > rules.latency * before:
            return Verdict(
                ROLLED_BACK, f"its 95th percentile is {after:.2f} ms against {before:.2f} ms"
            )
    if len(losses) < rules.least_labelled:
        return None
    gain, low, high, p = paired(losses)
    unit = 1.0 if classes else max(float(losses[:, 0].mean()), 1e-12)
    what = "accuracy" if classes else "mean squared error, as a share of it"
    figures = (
        f"{what}: better by {gain / unit:+.4f}, 95 % interval {low / unit:+.4f} to "
        f"{high / unit:+.4f}, p = {p:.2g}, of {len(losses)} labelled records"
    )
    if high < 0:
        return Verdict(ROLLED_BACK, figures)
    # Twice the margin in the error is about the margin in its root.
    margin = rules.margin if classes else 2 * rules.margin
    if low > -margin * unit:
        return Verdict(PROMOTED, figures)
    return None


def paired(losses: np.ndarray) -> tuple[float, float, float, float]:
    """Compare two versions on the same rows, losses [P, 2].

    Returns how much less the second one loses on average, the ends of the 95 % interval of that,
    and the two-sided p of the exact sign test, which for classes is McNemar's.
    """
    differences = losses[:, 0] - losses[:, 1]
    count = len(differences)
    gain = float(differences.mean())
    # One more that is better and one that is worse: intervals of few that differ are too short
    # without (Agresti and Min 2005).
    spread = np.append(differences, [1.0, -1.0] * bool(np.isin(losses, (0, 1)).all()))
    half = Z * float(spread.std()) / math.sqrt(count)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return gain, gain - half, gain + half, sign_test(better, worse)


def figures(
    comparison: Comparison, phase: str, share: float, live: Mapping[str, Live | None]
) -> dict[str, Any]:
    """What `/stats` and the registry tell. live: by "production" and "candidate"."""
    sides = {
        name: side.to_dict() | _accuracy(live.get(name)) for name, side in comparison.sides.items()
    }
    return {
        "candidate": comparison.candidate,
        "phase": phase,
        "share": share,
        "compared": comparison.rows,
        "agreement": comparison.agreed / comparison.rows if comparison.rows else None,
        "production": sides["production"],
        "candidate_figures": sides["candidate"],
    }


def _accuracy(live: Live | None) -> dict[str, Any]:
    if live is None:
        return {}
    return {live.metric: live.value, "low": live.low, "high": live.high, "labelled": live.count}
