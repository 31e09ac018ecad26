"""The expected duration of a batch: measured at compression, corrected while serving.

The serving host usually differs from the measuring host, and other processes share its cores. The
ratio of their durations is learned while serving.
"""

from bisect import bisect_left
from collections.abc import Sequence

from train.bundle.manifest import Timing, Variant

# A larger batch must take less than this share of the time per row to be worth the longer wait.
WORTH = 0.97
# Weight of a new measurement in the running ratio, and the factor by which it may exceed the ratio:
# a machine that paused for a minute is not that slow. The ratio also has a lower limit, because no
# serving host is a hundred times as fast as the measuring host.
LEARNING_RATE, MOST = 0.1, 4.0
LEAST_RATIO = 0.05


class LatencyModel:
    """The duration of a batch of any size, interpolated linearly between the measured sizes."""

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        """sizes: batch sizes in rows, increasing. seconds: the measured duration of each."""
        assert len(sizes) == len(seconds) > 0
        self._sizes, self._seconds = list(sizes), list(seconds)
        self.ratio = 1.0

    @classmethod
    def of(cls, variant: Variant, threads: int) -> "LatencyModel":
        """Return the model of a variant, measured at the thread count nearest to `threads`."""
        timings = [timing for timing in variant.profile if timing.engine == variant.engine]
        nearest = min({t.threads for t in timings}, key=lambda count: abs(count - threads))

        def size(timing: Timing) -> int:
            return timing.batch_size

        chosen = sorted((t for t in timings if t.threads == nearest), key=size)
        return cls([size(t) for t in chosen], [t.p50_ms / 1e3 for t in chosen])

    @property
    def best_rows(self) -> int:
        """The batch size with the most rows per second; the smaller of two that are about equal."""
        best = 0
        for index, (size, seconds) in enumerate(zip(self._sizes, self._seconds, strict=True)):
            if seconds / size < WORTH * self._seconds[best] / self._sizes[best]:
                best = index
        return self._sizes[best]

    def seconds(self, rows: int) -> float:
        """Return the expected duration of a batch of `rows` rows, in seconds.

        Batches above the largest measured size have the same duration per row as that size.
        """
        return self.ratio * self.measured(rows)

    def observe(self, rows: int, seconds: float) -> None:
        """Update the ratio with the duration of a batch that ran."""
        seen = max(min(seconds / self.measured(rows), MOST * self.ratio), LEAST_RATIO)
        self.ratio += LEARNING_RATE * (seen - self.ratio)

    def rows_within(self, seconds: float, most: int) -> int:
        """Return the largest batch size up to `most` that takes at most `seconds`; at least 1."""
        low, high = 1, most
        if self.seconds(most) <= seconds:
            return most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle - 1)
        return low

    def measured(self, rows: int) -> float:
        """Return the duration of a batch on the measuring host, in seconds."""
        sizes, seconds = self._sizes, self._seconds
        index = bisect_left(sizes, rows)
        if index == len(sizes):
            return seconds[-1] * rows / sizes[-1]
        if index == 0 or sizes[index] == rows:
            return seconds[index]
        share = (rows - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])
