"""The expected duration of a batch: measured at compression, corrected while serving.

The serving host usually differs from the measuring host, and other processes share its cores. The
ratio of their durations is learned while serving.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from train.bundle import cost_model
from train.bundle.manifest import Timing, Variant, typical_timings

# A larger batch must take less than this share of the time per row to be worth the longer wait.
WORTH = 0.97
# Seconds that a batch costs outside the engine: to choose its rows, and to start and end it.
BATCH_S = 0.0005
# Weight of a new measurement in the running ratio, and the factor by which it may exceed the ratio:
# a machine that paused for a minute is not that slow. The ratio also has a lower limit, because no
# serving host is a hundred times as fast as the measuring host.
LEARNING_RATE, MOST = 0.1, 4.0
LEAST_RATIO = 0.05


# Length of a row; None stands for the median length, and for rows that all have the same shape.
Length = int | None


class LatencyModel:
    """The duration of a batch of any size, interpolated linearly between the measured sizes."""

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        """sizes: batch sizes in rows, increasing. seconds: the measured duration of each."""
        assert len(sizes) == len(seconds) > 0
        self._sizes, self._seconds = list(sizes), list(seconds)
        self.ratio = 1.0
        # The batch size with the most rows per second; the smaller of two that are about equal.
        self.best_rows = self._best_rows()

    @classmethod
    def of(cls, variant: Variant, threads: int) -> "LatencyModel":
        """Return the model of a variant, measured at the thread count nearest to `threads`."""
        timings = variant.measured(threads)
        if timings[0].length is not None:
            return LengthModel(timings)

        def size(timing: Timing) -> int:
            return timing.batch_size

        chosen = sorted(timings, key=size)
        return cls([size(t) for t in chosen], [t.p50_ms / 1e3 for t in chosen])

    def _best_rows(self) -> int:
        best = 0
        for index, (size, seconds) in enumerate(zip(self._sizes, self._seconds, strict=True)):
            if seconds / size < WORTH * self._seconds[best] / self._sizes[best]:
                best = index
        return self._sizes[best]

    def seconds(self, rows: int, length: Length = None) -> float:
        """Return the expected duration of a batch of `rows` rows of a length, in seconds.

        Batches above the largest measured size have the same duration per row as that size.
        """
        return self.ratio * self.measured(rows, length)

    def work(self, length: Length = None) -> int:
        """Return the work of a row, in units that `unit_s` gives the duration of."""
        return 1

    def unit_s(self, batch: int) -> float:
        """Return the expected duration of a unit of work in batches of `batch` rows, in seconds."""
        return self.seconds(batch) / batch

    def observe(self, rows: int, seconds: float, length: Length = None) -> None:
        """Update the ratio with the duration of a batch that ran."""
        seen = max(min(seconds / self.measured(rows, length), MOST * self.ratio), LEAST_RATIO)
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

    def measured(self, rows: int, length: Length = None) -> float:
        """Return the duration of a batch on the measuring host, in seconds."""
        sizes, seconds = self._sizes, self._seconds
        index = bisect_left(sizes, rows)
        if index == len(sizes):
            return seconds[-1] * rows / sizes[-1]
        if index == 0 or sizes[index] == rows:
            return seconds[index]
        share = (rows - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])


class LengthModel(LatencyModel):
    """The duration of a batch of any number of rows and any length, from a fitted formula."""

    def __init__(self, timings: Sequence[Timing]) -> None:
        """timings: of one engine and thread count, those of the median length first."""
        typical = sorted(typical_timings(timings), key=lambda timing: timing.batch_size)
        super().__init__([t.batch_size for t in typical], [t.p50_ms / 1e3 for t in typical])
        self._cost = cost_model.fit_timings(timings)
        self._typical = timings[0].length or 1
        self._works: dict[Length, int] = {}

    def work(self, length: Length = None) -> int:
        if length not in self._works:
            # In microseconds on the measuring host.
            seconds = self.measured(self.best_rows, length) / self.best_rows
            self._works[length] = max(round(1e6 * seconds), 1)
        return self._works[length]

    def unit_s(self, batch: int) -> float:
        return 1e-6 * self.ratio

    def measured(self, rows: int, length: Length = None) -> float:
        length = self._typical if length is None else length
        return float(self._cost.seconds(rows, length))

    def best_window(
        self, lengths: Sequence[int], anchor: int, most_rows: int, limit_s: float
    ) -> slice:
        """Return the rows to run together: neighbours in length, among them `anchor`.

        They are those with the most useful work per second, without padding; of several that are
        about equal, those that take the least time. lengths: of the waiting rows, increasing.
        most_rows: maximum number of rows. limit_s: maximum duration, unless `anchor` alone takes
        longer.
        """
        # Plain numbers: for the few rows that a batch has, numpy takes several times as long.
        alone = [self._cost.seconds(1, length) for length in lengths]
        total = [0.0, *accumulate(alone)]
        found = []
        for end in range(anchor, min(anchor + most_rows, len(lengths))):
            for start in range(max(end - most_rows + 1, 0), anchor + 1):
                rows = end - start + 1
                seconds = self.ratio * self._cost.seconds(rows, lengths[end])
                if seconds <= limit_s or rows == 1:
                    rate = (total[end + 1] - total[start]) / (seconds + BATCH_S)
                    found.append((seconds, start, end + 1, rate))
        enough = WORTH * max(rate for *_, rate in found)
        _, start, stop, _ = min(each for each in found if each[-1] >= enough)
        return slice(start, stop)
