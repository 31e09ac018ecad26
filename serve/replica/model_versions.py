"""The versions of one model that a replica serves side by side."""

import asyncio
import logging
from collections.abc import Callable

from serve.errors import NotFound, Unavailable
from serve.inference.dataplane import DataPlane
from serve.replica.pipeline import Endpoint, PredictionPipeline
from serve.rollout.aggregator import ReplicaReport
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot, merge_samples

logger = logging.getLogger(__name__)

# The reasons for which requests are rejected because of the load, as metrics count them.
LOAD_REASONS = ("overloaded", "deadline", "queue_full", "timeout")


class ModelVersions:
    """The loaded versions, and an endpoint for each. Belongs to one event loop."""

    def __init__(
        self,
        state: ServingState,
        load: Callable[[str, str], DataPlane],
        pipeline: PredictionPipeline,
    ) -> None:
        """Load the versions of `state`.

        load: (location, version) → a version that has passed its self-test and is warmed up.
        Raises CorruptBundle if a version fails its self-test.
        """
        self._load = load
        self._pipeline = pipeline
        self._locations: dict[str, str] = {}
        self._planes: dict[str, DataPlane] = {}
        self._endpoints: dict[str | None, Endpoint] = {}
        self.state = state
        self._adopt(state, self._load_missing(state))

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def versions(self) -> list[str]:
        """The numbers of the loaded versions."""
        return list(self._planes)

    def ready(self) -> bool:
        """Return whether the model is loaded."""
        return self.state.loaded

    def find(self, name: str, version: str | None = None) -> Endpoint:
        """Return the endpoint of a version, which is a number, an alias or None for the default.

        Raises NotFound if the model or version is not served, Unavailable if the model is unloaded.
        """
        state = self.state
        if name != state.name:
            raise NotFound(
                f"model '{name[:100]}' is not served here; GET /v2/models lists those that are."
            )
        if not state.loaded:
            raise Unavailable(
                f"model '{name}' is unloaded; POST /v2/repository/models/{name}/load loads it.", 10
            )
        number = None if version is None else state.aliases.get(version, version)
        endpoint = self._endpoints.get(number)
        if endpoint is None:
            known = ", ".join([*self._planes, *state.aliases])
            raise NotFound(
                f"version '{str(version)[:100]}' of '{name}' is not served; expected {known}."
            )
        return endpoint

    async def install(self, state: ServingState) -> None:
        """Switch to another state. Requests in progress finish with the version they started with.

        Raises CorruptBundle if a version fails its self-test; the old state then stays installed.
        """
        self._adopt(state, await asyncio.to_thread(self._load_missing, state))

    def report(self) -> ReplicaReport:
        """Return the observations since the last report."""
        blocks = {
            version: plane.sampler.drained()
            for version, plane in self._planes.items()
            if plane.sampler is not None
        }
        return self._pipeline.reports.drain(blocks)

    async def close(self) -> None:
        """Write the entries of the request log that are still in memory."""
        await self._pipeline.close()

    def load(self) -> float:
        """Return the work in progress, as the number of rows of the median length."""
        return sum(plane.batcher.load for plane in self._planes.values())

    def engine_s(self) -> float:
        """Return the total seconds that engines were busy, including the running batches."""
        planes = self._planes.values()
        return sum(plane.metrics.engine_s + plane.batcher.running_s for plane in planes)

    def num_refused(self) -> int:
        """Return the total number of requests that were rejected because of the load."""
        planes = self._planes.values()
        return sum(plane.metrics.refused[reason] for plane in planes for reason in LOAD_REASONS)

    def num_responses(self) -> int:
        """Return the total number of requests that got a response."""
        planes = self._planes.values()
        return sum(sum(plane.metrics.requests.values()) for plane in planes)

    def snapshot(self, replica: str) -> Snapshot:
        """Return the metrics of all versions and of the request log."""
        parts = [plane.snapshot(replica=replica) for plane in self._planes.values()]
        labels = {"model": self.name, "replica": replica}
        return merge_samples([*parts, self._pipeline.snapshot(labels)])

    def _load_missing(self, state: ServingState) -> dict[str, DataPlane]:
        """Load the versions of a state that are not loaded yet."""
        known = self._locations.items()
        return {
            version: self._load(location, version)
            for version, location in state.locations.items()
            if state.loaded and (version, location) not in known
        }

    def _adopt(self, state: ServingState, planes: dict[str, DataPlane]) -> None:
        wanted = state.locations if state.loaded else {}
        before = self._planes
        self._planes = {version: planes.get(version) or before[version] for version in wanted}
        self._locations = dict(wanted)
        self._endpoints = self._pipeline.compose(state, self._planes)
        self.state = state
        logger.info("serving %s versions %s, default %s", state.name, list(wanted), state.default)
