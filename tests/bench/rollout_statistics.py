"""python -m tests.bench.rollout_statistics: how often rollouts are decided wrongly, and how soon.

Simulates rollouts and evaluates each after every labelled request. "at the margin" means a
candidate that is worse by exactly the margin, "as good" one without a difference. Prints a JSON
object.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from serve.config import RolloutOptions
from serve.rollout.verdict import ALPHA, LabelEvidence

RULES = RolloutOptions()
RUNS, REQUESTS = 2000, 20_000


def simulate(draw: Callable[[], Any], *, classes: bool) -> dict[str, float | None]:
    """Simulate RUNS rollouts; return how often and how soon they are decided.

    draw: returns the losses of production and candidate, float64 [2, RUNS], for the next request of
    each rollout. The result has the shares of rollouts that are ever promoted and ever rolled back
    by accuracy, and the median and 90th percentile of requests until a promotion (None if beyond
    REQUESTS).
    """
    evidence = LabelEvidence(RULES, classes=classes)
    promoted_N, worse_N = np.full(RUNS, np.inf), np.full(RUNS, np.inf)
    for number in range(1, REQUESTS + 1):
        evidence.add(*draw())
        if number >= RULES.min_labels:
            not_inferior, worse = evidence.evidence()
            promoted_N[(not_inferior >= 1 / ALPHA) & np.isinf(promoted_N)] = number
            worse_N[(worse >= 1 / ALPHA) & np.isinf(worse_N)] = number
    median, most = np.quantile(promoted_N, [0.5, 0.9], method="higher")
    return {
        "promoted": round(float(np.isfinite(promoted_N).mean()), 4),
        "called worse": round(float(np.isfinite(worse_N).mean()), 4),
        "median requests": int(median) if np.isfinite(median) else None,
        "90 % of requests": int(most) if np.isfinite(most) else None,
    }


def answers(
    rng: np.random.Generator, discordant: float, gain: float, rows: int, alike: bool
) -> Callable[[], Any]:
    """Return a function that draws losses of rows, all right or all wrong together if `alike`."""
    chances = [1 - discordant, (discordant + gain) / 2, (discordant - gain) / 2]

    def draw() -> Any:
        kinds = rng.choice(3, p=chances, size=(RUNS, 1 if alike else rows))
        return np.array([(kinds == kind).mean(axis=1) for kind in (1, 2)])

    return draw


def values(rng: np.random.Generator, ratio: float, correlation: float) -> Callable[[], Any]:
    """Return a function that draws heavy-tailed squared errors.

    ratio: the candidate's root mean squared error divided by production's.
    """

    def draw() -> Any:
        one, other = rng.standard_t(5, size=(2, RUNS))
        return one**2, (ratio * (correlation * one + (1 - correlation**2) ** 0.5 * other)) ** 2

    return draw


def main() -> None:
    rng = np.random.default_rng(0)
    margin = RULES.noninferiority_margin
    figures = {}
    for discordant in (0.01, 0.05, 0.1, 0.3):
        for name, gain in (("at the margin", -margin), ("as good", 0.0)):
            draw = answers(rng, discordant, gain, 1, alike=True)
            figures[f"{discordant:.0%} differ, {name}"] = simulate(draw, classes=True)
    for alike in (True, False):
        draw = answers(rng, 0.05, -margin, 16, alike)
        rows = "16 alike rows" if alike else "16 rows"
        figures[f"5% differ, {rows} a request, at the margin"] = simulate(draw, classes=True)
    for correlation in (0.5, 0.95):
        for name, ratio in (("at the margin", 1 + margin), ("as good", 1.0)):
            draw = values(rng, ratio, correlation)
            key = f"values, correlation {correlation}, {name}"
            figures[key] = simulate(draw, classes=False)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
