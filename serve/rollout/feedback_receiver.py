"""Receives feedback, the labels of answered requests, and matches it with the predictions."""

import asyncio
from collections.abc import Sequence
from typing import Any

from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound, Unavailable
from serve.requestlog import reader
from serve.requestlog.writer import FeedbackLog, RequestSample
from serve.rollout.aggregator import MetricsAggregator
from serve.rollout.feedback import FeedbackStore, Prediction

# Minimum time between two reports of a replica's predictions.
PUSH_INTERVAL_S = 0.1
# How long feedback waits for the predictions of its request. They are normally sent within
# PUSH_INTERVAL_S; the rest is reserve for an overloaded server.
ARRIVAL_S = 2.0
# After this time the request log is searched too, because most requests whose predictions have not
# arrived by then are old.
SEARCH_AFTER_S = 2 * PUSH_INTERVAL_S
# Maximum feedback that waits for its request; searches of the log run one after the other.
MAX_SEARCHES = 64
# How long feedback waits for a server that has just started.
START_S = 15.0


class FeedbackReceiver:
    """Receives the feedback on one model. Belongs to one event loop."""

    def __init__(self, config: ServeConfig, name: str, aggregator: MetricsAggregator) -> None:
        self._name, self._aggregator = name, aggregator
        self._root = config.storage
        self._sample = RequestSample(config.log.sample_rate)
        self._log: FeedbackLog | None = None
        if config.log.sample_rate:
            self._log = FeedbackLog(self._root, name, config.log)
        self._search = asyncio.Lock()
        self._searching = 0

    async def receive(
        self, request_id: str, truths: Sequence[Any], any_owner: str | None = None
    ) -> dict[str, Any]:
        """Store the label of each record of a request; return the response.

        any_owner: the id without its owner, to find requests of any API key in memory; requests
        that are no longer in memory are found by `request_id` only.

        Raises NotFound for an unknown request, BadRequest if the labels do not fit the model or the
        request or the server has no request log, Unavailable if the server has not started yet or
        too much feedback is waiting.
        """
        if self._log is None:
            raise BadRequest("feedback needs the request log; serve with log.sample_rate > 0.")
        store = await self._store()
        if any_owner is not None and not store.knows(request_id):
            request_id = store.find(any_owner) or request_id
        if not self._sample.has(request_id):
            return {"id": request_id, "counted": False, "reason": "this request is not sampled"}
        if not (store.knows(request_id) or await self._find(store, request_id, len(truths))):
            raise NotFound(
                f"no request '{(any_owner or request_id)[:100]}' is known for this key; give the "
                "x-request-id of a response."
            )
        changed = store.give(request_id, truths)
        for row, truth in enumerate(truths):
            self._log.add(request_id, row, store.truth(truth))
        return {"id": request_id, "counted": True, "changed": changed}

    async def close(self) -> None:
        """Write the buffered rows of the feedback log."""
        if self._log is not None:
            await self._log.close()

    async def _store(self) -> FeedbackStore:
        """Wait for the first version to be monitored. Raises Unavailable."""
        try:
            await asyncio.wait_for(self._aggregator.started.wait(), START_S)
        except TimeoutError:
            raise Unavailable("the model is not monitored yet; try again.", 5) from None
        assert self._aggregator.feedback is not None
        return self._aggregator.feedback

    async def _find(self, store: FeedbackStore, request_id: str, count: int) -> bool:
        """Wait for a replica to send the predictions, or read them from the request log."""
        if self._searching >= MAX_SEARCHES:
            raise Unavailable("too much feedback on earlier requests is waiting; try again.", 5)
        arrival = asyncio.create_task(self._arrival(store, request_id))
        self._searching += 1
        try:
            done, _ = await asyncio.wait({arrival}, timeout=SEARCH_AFTER_S)
            if done:
                return True
            return await self._find_in_log(store, request_id, count) or await arrival
        finally:
            self._searching -= 1
            arrival.cancel()

    async def _arrival(self, store: FeedbackStore, request_id: str) -> bool:
        """Wait for the predictions of a request; return whether they arrive within ARRIVAL_S."""
        try:
            async with asyncio.timeout(ARRIVAL_S):
                while not store.knows(request_id):
                    await self._aggregator.next_report()
        except TimeoutError:
            return False
        return True

    async def _find_in_log(self, store: FeedbackStore, request_id: str, count: int) -> bool:
        async with self._search:
            rows = await asyncio.to_thread(reader.find_request, self._root, self._name, request_id)
        if store.knows(request_id):
            return True
        if not rows:
            return False
        # Only some rows of a large request are logged.
        predictions: list[Prediction | None] = [None] * max(count, rows[-1].row + 1)
        for row in rows:
            predictions[row.row] = row.prediction
        store.predicted(request_id, rows[0].version, predictions)
        return True
