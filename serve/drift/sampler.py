"""The sampler: a replica's part of the monitor. It counts some of what is asked and answered.

A request costs a look at the clock; what is taken is copied, and counted in a thread, a block at a
time. What the blocks of all replicas say is told by `windows`.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from train.bundle import feature_statistics
from train.bundle.feature_statistics import Quantity
from train.tasks import Arrays, Task
from train.values.records import concatenate, num_rows

logger = logging.getLogger(__name__)

BLOCK_ROWS = 50
# Blocks kept for a repository that does not answer; then the oldest are left out.
MAX_BLOCKS = 100

# Counts of a block, as of `Quantity.counts`, by the name of the quantity.
Block = dict[str, np.ndarray]


class DriftSampler:
    """Counts of one plane. Belongs to one event loop.

    seen: rows that were answered. sampled: those that were counted.
    """

    def __init__(self, task: Task, watched: dict[str, Quantity], rows_per_s: float) -> None:
        """rows_per_s: how many rows are counted at most, whatever comes."""
        self._task, self._watched, self._rows_per_s = task, watched, rows_per_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._allowed, self._at = float(BLOCK_ROWS), 0.0
        self._rows: list[tuple[Arrays, Arrays]] = []
        self._collected = 0
        self._blocks: list[Block] = []
        self.seen = self.sampled = 0

    def saw(self, inputs: Arrays, predictions: Arrays, now: float) -> None:
        """Take some rows of a request that was answered. now: of the monotonic clock."""
        count = num_rows(inputs)
        self.seen += count
        self._allowed += (now - self._at) * self._rows_per_s
        self._allowed, self._at = min(self._allowed, float(BLOCK_ROWS)), now
        take = min(count, int(self._allowed), BLOCK_ROWS - self._collected)
        if take <= 0:
            return
        self._allowed -= take
        # Evenly over a large request, whose neighbours are often alike. A copy: the rows may be a
        # part of a body of megabytes.
        rows = np.arange(take) * count // take
        self._rows.append((_taken(inputs, rows), _taken(predictions, rows)))
        self._collected += take
        if self._collected == BLOCK_ROWS:
            full, self._rows, self._collected = self._rows, [], 0
            counting = asyncio.get_running_loop().run_in_executor(self._thread, self._count, full)
            counting.add_done_callback(self._counted)

    def drained(self) -> list[Block]:
        """The blocks since it was asked last."""
        blocks, self._blocks = self._blocks, []
        return blocks

    def _count(self, rows: list[tuple[Arrays, Arrays]]) -> Block:
        inputs = concatenate([given for given, _ in rows])
        predictions = concatenate([answered for _, answered in rows])
        measured = feature_statistics.measure_quantities(self._task, inputs, predictions)
        return {
            name: quantity.count(measured[name].values)
            for name, quantity in self._watched.items()
            if name in measured
        }

    def _counted(self, counting: "asyncio.Future[Block]") -> None:
        error = counting.exception()
        if error is not None:
            logger.error("a block of rows could not be counted", exc_info=error)
            return
        self.sampled += BLOCK_ROWS
        self._blocks = [*self._blocks, counting.result()][-MAX_BLOCKS:]


def _taken(arrays: Arrays, rows: np.ndarray) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}
