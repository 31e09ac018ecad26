"""Buffer for the observations of a replica until they are sent to the repository."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping

from serve.drift.sampler import Block
from serve.rollout.aggregator import ReplicaReport
from serve.rollout.feedback import Prediction
from serve.rollout.verdict import ArmComparison

# Most requests and rows kept while the repository does not respond. The oldest are dropped first.
MAX_REQUESTS, MAX_ROWS = 50_000, 200_000


class ReportBuffer:
    """Predictions of requests and the comparison of a rollout. Belongs to one event loop."""

    def __init__(self) -> None:
        self._predictions: deque[tuple[str, str, list[Prediction]]] = deque()
        self._rows = 0
        self._comparison: ArmComparison | None = None
        self._added = asyncio.Event()

    def add_predictions(self, request_id: str, version: str, predictions: list[Prediction]) -> None:
        """Add a version's predictions for the records of a request."""
        self._predictions.append((request_id, version, predictions))
        self._rows += len(predictions)
        while len(self._predictions) > MAX_REQUESTS or self._rows > MAX_ROWS:
            self._rows -= len(self._predictions.popleft()[2])
        self._added.set()

    def comparison(self, candidate: str) -> ArmComparison:
        """Return the comparison with a candidate, to which results are added.

        It is valid until the next `await`, because `drain` replaces it.
        """
        if self._comparison is None or self._comparison.candidate != candidate:
            self._comparison = ArmComparison(candidate)
        self._added.set()
        return self._comparison

    async def wait(self, timeout_s: float) -> None:
        """Return once there is something to send, or after `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._added.wait(), timeout_s)

    def drain(self, blocks: Mapping[str, list[Block]]) -> ReplicaReport:
        """Return a report of everything since the last call.

        blocks: drift statistics by version, which are added to the report.
        """
        predictions, comparison = list(self._predictions), self._comparison
        self._predictions.clear()
        self._rows = 0
        self._comparison = None
        self._added.clear()
        return ReplicaReport(dict(blocks), predictions, comparison)
