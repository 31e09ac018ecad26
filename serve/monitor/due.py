"""Whether a model should be trained again: by drift, and by how often it is right."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.tasks.targets import LOWER_IS_BETTER

MAX_SHOWN = 5


@dataclass(frozen=True)
class Rules:
    """windows: how many of the last `of` windows must have alarms.

    max_drop: how much worse than expected the live metric may be, even at the better end of its
    95 % interval; an error in `unit`.
    """

    windows: int
    of: int
    max_drop: float
    unit: float = 1.0


@dataclass(frozen=True)
class Decision:
    due: bool
    reason: str


def decide(watched: Mapping[str, Any] | None, version: str, rules: Rules) -> Decision:
    """Decide by the monitor's file (None if there is none) about the version in production."""
    of_version = (watched or {}).get("versions", {}).get(version)
    if of_version is None:
        return Decision(False, f"nothing has been seen of version {version} yet")
    reasons = []
    for is_due, reason in (_by_drift(of_version, rules), _by_feedback(of_version, rules)):
        if is_due:
            return Decision(True, f"version {version}: {reason}")
        reasons.append(reason)
    return Decision(False, f"version {version}: {'; '.join(reasons)}")


def _by_drift(watched: Mapping[str, Any], rules: Rules) -> tuple[bool, str]:
    windows = watched["windows"][-rules.of :]
    alarmed = [window for window in windows if window["alarms"]]
    counts = Counter(
        name
        for window in alarmed
        for name in sorted({alarm["feature"] for alarm in window["alarms"]})
    )
    names = ", ".join(name for name, _ in counts.most_common(MAX_SHOWN))
    words = f"{len(alarmed)} of the last {len(windows)} windows drifted"
    words += f" ({names})" if names else ""
    if len(alarmed) >= rules.windows:
        return True, words
    return False, f"{words}, {rules.windows} of {rules.of} are needed"


def _by_feedback(watched: Mapping[str, Any], rules: Rules) -> tuple[bool, str]:
    live = watched["feedback"]
    if not live or live.get("expected") is None:
        return False, "no truth is known"
    metric, expected = live["metric"], live["expected"]
    lower = metric.endswith(LOWER_IS_BETTER)
    allowed = rules.max_drop * (rules.unit if lower else 1.0)
    limit = expected + allowed if lower else expected - allowed
    words = (
        f"live {metric} {live['value']:.4g} [{live['low']:.4g}, {live['high']:.4g}] of "
        f"{live['count']}, {expected:.4g} expected"
    )
    worse = live["low"] > limit if lower else live["high"] < limit
    return worse, words if worse else f"{words}, which may be as much as {allowed:.3g} worse"
