"""A sketch of many latencies in little memory: counts in bins of equal relative width."""

import math
from collections import Counter

from train.stats import quantile_ranks

# Largest relative error of a latency that is read from a sketch.
RELATIVE_ERROR = 0.01
_GAMMA = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
# Shorter latencies count as this one, seconds.
SHORTEST_S = 1e-6


class LatencySketch:
    """A mergeable quantile sketch of latencies in seconds.

    Masson, Rim and Lee, DDSketch, Proceedings of the VLDB Endowment 12 (2019), section 2.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def observe(self, seconds: float) -> None:
        """Add one latency."""
        self._counts[math.ceil(math.log(max(seconds, SHORTEST_S)) / _GAMMA)] += 1

    def add(self, other: "LatencySketch") -> None:
        """Add all latencies of another sketch."""
        self._counts.update(other._counts)

    @property
    def count(self) -> int:
        return self._counts.total()

    def quantile(self, share: float) -> float:
        """Return the latency in seconds that a fraction `share` of the requests do not exceed.

        Raises IndexError if there are no requests.
        """
        return self._at(max(1, math.ceil(share * self.count)))

    def sequential_interval(self, share: float, alpha: float) -> tuple[float, float]:
        """Return a confidence interval of a quantile in seconds, valid however often it is used.

        It covers the quantile with probability 1 - alpha over the whole sequence of requests; see
        `quantile_ranks`. While there are too few requests, its ends are 0 and infinity.
        """
        low, high = quantile_ranks(self.count, share, alpha)
        return (
            self._at(low) if low >= 1 else 0.0,
            self._at(high) if high <= self.count else math.inf,
        )

    def _at(self, rank: int) -> float:
        """Return the latency of a rank; 1 is the shortest."""
        for number in sorted(self._counts):
            rank -= self._counts[number]
            if rank <= 0:
                # The value with the same relative distance to both ends of the bin.
                return math.exp(number * _GAMMA) * (1 - RELATIVE_ERROR)
        raise IndexError("rank is larger than the number of requests")
