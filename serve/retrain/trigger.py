"""The decision whether a model should be retrained, from drift alarms and live metrics."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.drift.windows import DriftWindow
from serve.rollout.monitor_state import LiveFeedback, MonitorState

MAX_SHOWN = 5


@dataclass(frozen=True)
class RetrainRules:
    """When retraining is due.

    windows: how many of the last `of` windows must have drift alarms. max_drop: how much worse than
    on the test split the better end of the live metric's 95 % interval may be; for an RMSE, as a
    multiple of `unit`.
    """

    windows: int
    of: int
    max_drop: float
    unit: float = 1.0


@dataclass(frozen=True)
class RetrainDecision:
    """Whether retraining is due, and why or why not."""

    due: bool
    reason: str


def decide_retrain(
    state: MonitorState | None, version: str, rules: RetrainRules
) -> RetrainDecision:
    """Decide whether to retrain. version: in production. state: None if nothing was monitored."""
    monitored = None if state is None else state.versions.get(version)
    if monitored is None:
        return RetrainDecision(False, f"version {version} has not been monitored yet")
    found = (_by_drift(monitored.windows, rules), _by_feedback(monitored.feedback, rules))
    due = [reason for is_due, reason in found if is_due]
    reasons = due or [reason for _, reason in found]
    return RetrainDecision(bool(due), f"version {version}: {'; '.join(reasons)}")


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
    return False, f"{words}; {rules.windows} of {rules.of} are needed"


def _by_feedback(live: LiveFeedback | None, rules: RetrainRules) -> tuple[bool, str]:
    if live is None or live.expected is None:
        return False, "there is no live metric to compare with the test split"
    lower = live.metric == "rmse"  # else the accuracy
    allowed = rules.max_drop * (rules.unit if lower else 1.0)
    limit = live.expected + allowed if lower else live.expected - allowed
    words = (
        f"live {live.metric} {live.value:.4g} [{live.low:.4g}, {live.high:.4g}] of "
        f"{live.count}, {live.expected:.4g} expected"
    )
    worse = live.low > limit if lower else live.high < limit
    return worse, words if worse else f"{words}; up to {allowed:.3g} worse is allowed"
