"""Receives labels of answered requests and matches them with the predictions."""

import asyncio
from collections.abc import Sequence
from typing import Any

from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound, Unavailable
from serve.requestlog import reader
from serve.requestlog.writer import FeedbackLog, RequestSample
from serve.rollout.aggregator import MetricsAggregator
from serve.rollout.feedback import FeedbackStore, Prediction

# How often a replica sends its predictions, at most.
PUSH_INTERVAL_S = 0.1
# How long feedback waits for the predictions of its request. They are sent within PUSH_INTERVAL_S;
# the rest is for a server that is overloaded.
ARRIVAL_S = 2.0
# After this the request log is searched meanwhile: most requests that have not arrived are old.
SEARCH_AFTER_S = 2 * PUSH_INTERVAL_S
# Feedback that waits for its request at once; the log is searched for one after the other.
MAX_SEARCHES = 64
# How long feedback waits for a server that has just started.
START_S = 15.0


class FeedbackReceiver:
    """Belongs to one event loop."""

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
        """Take the label of each record of a request.

        any_owner: the id without its owner, to find the request of another key by; one that is no
        longer in memory is found by `request_id` alone.

        Raises NotFound for a request that was not answered here, BadRequest for labels that do not
        fit the model or the request, Unavailable for a server that has not started yet.
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
        """Write the rest of the feedback log."""
        if self._log is not None:
            await self._log.close()

    async def _store(self) -> FeedbackStore:
        """Wait for the first version to be monitored. Raises Unavailable."""
        try:
            await asyncio.wait_for(self._aggregator.started.wait(), START_S)
        except TimeoutError:
            raise Unavailable("the model is not watched yet.", 5) from None
        assert self._aggregator.feedback is not None
        return self._aggregator.feedback

    async def _find(self, store: FeedbackStore, request_id: str, count: int) -> bool:
        """Wait for a replica to send the predictions, or read them from the request log."""
        if self._searching >= MAX_SEARCHES:
            raise Unavailable("too much feedback for earlier requests is waiting.", 5)
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
        """Return whether the predictions arrive in time."""
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
