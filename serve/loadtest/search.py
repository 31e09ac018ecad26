"""The highest rate at which a server still answers in time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.loadtest.report import LoadTestReport

# The rate is known when the highest that held and the lowest that did not differ by less.
PRECISION = 0.05
MIN_RATE_PER_S = 1.0


@dataclass
class RateSearch:
    """rate_per_s: the highest that held, 0.0 if none did; best: what was measured at it."""

    bound_ms: float
    rate_per_s: float = 0.0
    best: LoadTestReport | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        goodput = self.best.ok_per_s if self.best else 0.0
        return {
            "p99_bound_ms": self.bound_ms,
            "rate_per_s": self.rate_per_s,
            "goodput_per_s": goodput,
            "steps": self.steps,
        }


def find_rate(
    measure: Callable[[float], LoadTestReport],
    bound_ms: float,
    start_per_s: float = 100,
    tell: Callable[[str], None] = lambda line: None,
) -> RateSearch:
    """Double the rate while the p99 is within the bound and 99 % end well, then halve the gap.

    measure: loads the server at a rate. tell: is given a line for each step.
    """
    search = RateSearch(bound_ms)

    def holds(rate_per_s: float) -> bool:
        # Twice before it counts as too much: one short stall of the machine is not the server's.
        return step(rate_per_s) or step(rate_per_s)

    def step(rate_per_s: float) -> bool:
        report = measure(rate_per_s)
        held, p99 = report.holds(bound_ms), (report.latency_ms or {}).get("p99")
        share = report.within(bound_ms) / max(1, report.requests)
        figures = {"rate_per_s": round(rate_per_s, 1), "p99_ms": p99, "in_time": round(share, 4)}
        search.steps.append({**figures, "held": held})
        shown = f"p99 {p99:.1f} ms" if p99 is not None else "no good answer"
        tell(f"{rate_per_s:8.1f}/s  {shown}, {share:.1%} in time: {'held' if held else 'too much'}")
        if held:
            search.rate_per_s, search.best = round(rate_per_s, 1), report
        return held

    highest_rate(holds, start_per_s)
    return search


def highest_rate(holds: Callable[[float], bool], start_per_s: float) -> float:
    """Return a rate that holds, to PRECISION the highest; 0.0 if not even MIN_RATE_PER_S does.

    holds: whether a rate does; if one does, so do those below it.
    """
    low, high = 0.0, start_per_s
    while holds(high):
        low, high = high, 2 * high
    while low == 0.0:
        if high <= MIN_RATE_PER_S:
            return 0.0
        tried = max(MIN_RATE_PER_S, high / 2)
        if holds(tried):
            low = tried
        else:
            high = tried
    while high > (1 + PRECISION) * low:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
