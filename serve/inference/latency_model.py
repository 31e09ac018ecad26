"""How long the engine takes for a batch: what was measured at compression, corrected by what runs.

The host that measured is seldom the host that serves, and here other processes share its cores;
the ratio of the two is learned while serving.
"""

from bisect import bisect_left
from collections.abc import Sequence

from train.bundle.manifest import Timing, Variant

# A larger batch must be this much faster per row to be worth the longer wait.
WORTH = 0.97
# Of each new measurement in the running ratio, and how far one of them is believed: a machine that
# stood still for a minute is not that slow, and none is a hundred times as fast as another.
LEARNING_RATE, MOST = 0.1, 4.0
LEAST_RATIO = 0.05


class LatencyModel:
    """Seconds for a batch of any number of rows, linear between the sizes measured."""

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        """sizes: rows, increasing; seconds: of a batch of that many."""
        assert len(sizes) == len(seconds) > 0
        self._sizes, self._seconds = list(sizes), list(seconds)
        self.ratio = 1.0

    @classmethod
    def of(cls, variant: Variant, threads: int) -> "LatencyModel":
        """The timings of a variant's own engine at the number of threads nearest to `threads`."""
        timings = [timing for timing in variant.profile if timing.engine == variant.engine]
        nearest = min({t.threads for t in timings}, key=lambda count: abs(count - threads))

        def size(timing: Timing) -> int:
            return timing.batch_size

        chosen = sorted((t for t in timings if t.threads == nearest), key=size)
        return cls([size(t) for t in chosen], [t.p50_ms / 1e3 for t in chosen])

    @property
    def best_rows(self) -> int:
        """The batch that answers most rows a second; the smaller of two that are about as good."""
        best = 0
        for index, (size, seconds) in enumerate(zip(self._sizes, self._seconds, strict=True)):
            if seconds / size < WORTH * self._seconds[best] / self._sizes[best]:
                best = index
        return self._sizes[best]

    def seconds(self, rows: int) -> float:
        """Expected duration of one batch; beyond the largest size, as fast per row as that."""
        return self.ratio * self.measured(rows)

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a batch that ran."""
        seen = max(min(seconds / self.measured(rows), MOST * self.ratio), LEAST_RATIO)
        self.ratio += LEARNING_RATE * (seen - self.ratio)

    def rows_within(self, seconds: float, most: int) -> int:
        """The largest batch up to `most` that is done within `seconds`; at least 1."""
        low, high = 1, most
        if self.seconds(most) <= seconds:
            return most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle - 1)
        return low

    def measured(self, rows: int) -> float:
        """Duration of one batch on the machine that was measured."""
        sizes, seconds = self._sizes, self._seconds
        index = bisect_left(sizes, rows)
        if index == len(sizes):
            return seconds[-1] * rows / sizes[-1]
        if index == 0 or sizes[index] == rows:
            return seconds[index]
        share = (rows - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])
