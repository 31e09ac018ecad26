"""The sampler: the part of drift monitoring that runs in each replica.

It copies some rows of answered requests and counts their values in a thread, one block at a time,
so that it costs a request next to nothing. `windows` evaluates the blocks of all replicas. Shapes:
N rows.
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
# Blocks that are kept while the repository does not respond; beyond it the oldest are dropped.
MAX_BLOCKS = 100

# Counts of a block in the form of `Quantity.counts`, by the name of the quantity.
Block = dict[str, np.ndarray]


class DriftSampler:
    """Samples the rows that one data plane answers. Belongs to one event loop.

    seen: rows that were answered. sampled: rows that were counted.
    """

    def __init__(self, task: Task, watched: dict[str, Quantity], rows_per_s: float) -> None:
        """watched: quantities to count, by name. rows_per_s: maximum rows that are sampled."""
        self._task, self._watched, self._rows_per_s = task, watched, rows_per_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._allowed, self._at = float(BLOCK_ROWS), 0.0
        self._rows: list[tuple[Arrays, Arrays]] = []
        self._collected = 0
        self._blocks: list[Block] = []
        self.seen = self.sampled = 0

    def saw(self, inputs: Arrays, predictions: Arrays, now: float) -> None:
        """Sample some rows of an answered request.

        inputs, predictions: arrays [N, ...] by name. now: time of a monotonic clock, seconds.
        """
        count = num_rows(inputs)
        self.seen += count
        self._allowed += (now - self._at) * self._rows_per_s
        self._allowed, self._at = min(self._allowed, float(BLOCK_ROWS)), now
        take = min(count, int(self._allowed), BLOCK_ROWS - self._collected)
        if take <= 0:
            return
        self._allowed -= take
        # Evenly spaced rows of a large request, because neighbouring rows are often similar. They
        # are copied, because a view would keep the request's whole body in memory.
        rows = np.arange(take) * count // take
        self._rows.append((_taken(inputs, rows), _taken(predictions, rows)))
        self._collected += take
        if self._collected == BLOCK_ROWS:
            full, self._rows, self._collected = self._rows, [], 0
            counting = asyncio.get_running_loop().run_in_executor(self._thread, self._count, full)
            counting.add_done_callback(self._counted)

    def drained(self) -> list[Block]:
        """Return the blocks since the last call."""
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
            logger.error("a block of sampled rows could not be counted", exc_info=error)
            return
        self.sampled += BLOCK_ROWS
        self._blocks = [*self._blocks, counting.result()][-MAX_BLOCKS:]


def _taken(arrays: Arrays, rows: np.ndarray) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}
