"""The batcher: requests join in a batch when the engine frees up, never before.

A batch that is sealed while the engine is busy only waits, and under load a queue of small
batches builds up; sealing at the last moment lets batches grow just as large as the load asks.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.errors import Overloaded
from train.tasks import Arrays
from train.tasks.records import concatenate, num_rows


@dataclass(frozen=True)
class Waiting:
    rows: Arrays
    num_rows: int
    answer: asyncio.Future[Arrays]


class Batcher:
    """Runs one batch at a time, in a thread of its own. Belongs to one event loop."""

    def __init__(
        self, run: Callable[[Arrays], Arrays], *, max_batch_rows: int, max_queue_rows: int
    ) -> None:
        """run: a batch of any number of rows → as many rows of answers."""
        self._run = run
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._queue: deque[Waiting] = deque()
        self._queued_rows = 0
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def submit(self, rows: Arrays) -> Arrays:
        """Return the answers for `rows`, which may share a batch with others.

        A request larger than a batch is given to the engine in parts.
        Raises Overloaded at once when too many rows are waiting.
        """
        count = num_rows(rows)
        if self._queue and self._queued_rows + count > self._max_queue_rows:
            raise Overloaded(f"{self._queued_rows} rows are waiting already; try again later.")
        if count <= self._max_batch_rows:
            return await self._enqueue(rows, count)
        parts = []
        for start in range(0, count, self._max_batch_rows):
            end = min(start + self._max_batch_rows, count)
            part = {name: array[start:end] for name, array in rows.items()}
            parts.append(self._enqueue(part, end - start))
        return concatenate(await asyncio.gather(*parts))

    def _enqueue(self, rows: Arrays, count: int) -> asyncio.Future[Arrays]:
        answer: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        self._queue.append(Waiting(rows, count, answer))
        self._queued_rows += count
        if not self._busy:
            self._start_batch()
        return answer

    def _start_batch(self) -> None:
        batch = self._take_batch()
        if not batch:
            return
        self._busy = True
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._thread, self._compute, batch)
        done.add_done_callback(lambda future: self._finish_batch(batch, future))

    def _take_batch(self) -> list[Waiting]:
        """Take what fits from the front of the queue; drop what nobody waits for any more."""
        batch: list[Waiting] = []
        free = self._max_batch_rows
        while self._queue and self._queue[0].num_rows <= free:
            waiting = self._queue.popleft()
            self._queued_rows -= waiting.num_rows
            if not waiting.answer.done():
                batch.append(waiting)
                free -= waiting.num_rows
        return batch

    def _compute(self, batch: list[Waiting]) -> Arrays:
        return self._run(concatenate([waiting.rows for waiting in batch]))

    def _finish_batch(self, batch: list[Waiting], future: asyncio.Future[Arrays]) -> None:
        self._busy = False
        if self._queue:
            self._start_batch()
        error = future.exception()
        start = 0
        for waiting in batch:
            end = start + waiting.num_rows
            if waiting.answer.done():  # cancelled while the batch ran
                pass
            elif error is not None:
                waiting.answer.set_exception(error)
            else:
                answers = future.result()
                waiting.answer.set_result({name: answers[name][start:end] for name in answers})
            start = end
