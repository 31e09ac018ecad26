"""Whether a model should be trained again: by drift, and by how often it is right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.drift.windows import DriftWindow
from serve.rollout.monitor_state import LiveFeedback, MonitorState

MAX_SHOWN = 5


@dataclass(frozen=True)
class RetrainRules:
    """windows: how many of the last `of` windows must have alarms.

    max_drop: how much worse than expected the live metric may be, even at the better end of its
    95 % interval; an error in `unit`.
    """

    windows: int
    of: int
    max_drop: float
    unit: float = 1.0


@dataclass(frozen=True)
class RetrainDecision:
    due: bool
    reason: str


def decide_retrain(
    state: MonitorState | None, version: str, rules: RetrainRules
) -> RetrainDecision:
    """Decide about the version in production. state: None before anything was monitored."""
    monitored = None if state is None else state.versions.get(version)
    if monitored is None:
        return RetrainDecision(False, f"nothing has been seen of version {version} yet")
    reasons = []
    for is_due, reason in (
        _by_drift(monitored.windows, rules),
        _by_feedback(monitored.feedback, rules),
    ):
        if is_due:
            return RetrainDecision(True, f"version {version}: {reason}")
        reasons.append(reason)
    return RetrainDecision(False, f"version {version}: {'; '.join(reasons)}")


def _by_drift(windows: Sequence[DriftWindow], rules: RetrainRules) -> tuple[bool, str]:
    windows = windows[-rules.of :]
    alarmed = [window for window in windows if window.alarms]
    counts = Counter(
        name for window in alarmed for name in sorted({alarm.feature for alarm in window.alarms})
    )
    names = ", ".join(name for name, _ in counts.most_common(MAX_SHOWN))
    words = f"{len(alarmed)} of the last {len(windows)} windows drifted"
    words += f" ({names})" if names else ""
    if len(alarmed) >= rules.windows:
        return True, words
    return False, f"{words}, {rules.windows} of {rules.of} are needed"


def _by_feedback(live: LiveFeedback | None, rules: RetrainRules) -> tuple[bool, str]:
    if live is None or live.expected is None:
        return False, "no truth is known"
    lower = live.metric == "rmse"  # else the accuracy
    allowed = rules.max_drop * (rules.unit if lower else 1.0)
    limit = live.expected + allowed if lower else live.expected - allowed
    words = (
        f"live {live.metric} {live.value:.4g} [{live.low:.4g}, {live.high:.4g}] of "
        f"{live.count}, {live.expected:.4g} expected"
    )
    worse = live.low > limit if lower else live.high < limit
    return worse, words if worse else f"{words}, which may be as much as {allowed:.3g} worse"
