"""Latencies of many requests in little memory: counts by bins of equal relative width."""

import math
from collections import Counter

from train.stats import quantile_ranks

# Largest relative error of a latency that is read from a sketch.
RELATIVE_ERROR = 0.01
_GAMMA = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
# Shorter ones count as this, seconds.
SHORTEST_S = 1e-6


class LatencySketch:
    """A quantile sketch of seconds that can be merged.

    Masson, Rim and Lee, DDSketch, Proceedings of the VLDB Endowment 12 (2019), section 2.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def observe(self, seconds: float) -> None:
        self._counts[math.ceil(math.log(max(seconds, SHORTEST_S)) / _GAMMA)] += 1

    def add(self, other: "LatencySketch") -> None:
        self._counts.update(other._counts)

    @property
    def count(self) -> int:
        return self._counts.total()

    def quantile(self, share: float) -> float:
        """Return the latency in seconds that a share of the requests do not exceed.

        There must be at least one request.
        """
        return self._at(max(1, math.ceil(share * self.count)))

    def sequential_interval(self, share: float, alpha: float) -> tuple[float, float]:
        """Return an interval of the quantile that holds at every look; see `quantile_ranks`.

        Its ends are 0 and infinite while there are too few requests.
        """
        low, high = quantile_ranks(self.count, share, alpha)
        return (
            self._at(low) if low >= 1 else 0.0,
            self._at(high) if high <= self.count else math.inf,
        )

    def _at(self, rank: int) -> float:
        """The latency of the rank, counted from 1 for the shortest."""
        for number in sorted(self._counts):
            rank -= self._counts[number]
            if rank <= 0:
                # Between the ends of the bin, as far from both in relative terms.
                return math.exp(number * _GAMMA) * (1 - RELATIVE_ERROR)
        raise IndexError("there are fewer requests than that")
