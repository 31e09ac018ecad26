"""The search for the highest rate at which a server answers in time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.loadtest.report import LoadTestReport

# The search ends when the lowest rate that failed is at most this fraction above the highest rate
# that held.
PRECISION = 0.05
MIN_RATE_PER_S = 1.0


@dataclass
class RateSearch:
    """The result of a search.

    bound_ms: latency bound. rate_per_s: highest rate that held, 0.0 if none did. best: the report
    at that rate.
    """

    bound_ms: float
    rate_per_s: float = 0.0
    best: LoadTestReport | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
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
    """Return the highest rate at which 99 % of all requests succeed within the bound.

    The rate is doubled until it fails, then bisected. measure: runs the load at a rate, requests
    per second. tell: called with a line of progress for each step.
    """
    search = RateSearch(bound_ms)

    def holds(rate_per_s: float) -> bool:
        # A rate must fail twice, because one failure may be a short stall of the machine.
        return step(rate_per_s) or step(rate_per_s)

    def step(rate_per_s: float) -> bool:
        report = measure(rate_per_s)
        held, p99 = report.holds(bound_ms), (report.latency_ms or {}).get("p99")
        share = report.within(bound_ms) / max(1, report.requests)
        figures = {"rate_per_s": round(rate_per_s, 1), "p99_ms": p99, "in_time": round(share, 4)}
        search.steps.append({**figures, "held": held})
        shown = f"p99 {p99:.1f} ms" if p99 is not None else "no response"
        tell(f"{rate_per_s:8.1f}/s  {shown}, {share:.1%} in time: {'held' if held else 'too high'}")
        if held:
            search.rate_per_s, search.best = round(rate_per_s, 1), report
        return held

    highest_rate(holds, start_per_s)
    return search


def highest_rate(holds: Callable[[float], bool], start_per_s: float) -> float:
    """Return the highest rate that holds, to PRECISION; 0.0 if even MIN_RATE_PER_S fails.

    holds: returns whether a rate holds; all rates below one that holds must hold too.
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
