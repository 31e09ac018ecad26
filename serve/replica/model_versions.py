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

# Why requests are refused that a free engine would have answered.
LOAD_REASONS = ("overloaded", "deadline", "queue_full", "timeout")


class ModelVersions:
    """The loaded versions, and an endpoint for each. Belongs to one event loop."""

    def __init__(
        self,
        state: ServingState,
        load: Callable[[str, str], DataPlane],
        pipeline: PredictionPipeline,
    ) -> None:
        """load: (location, version) → a warm version whose golden self-test passed.

        Raises CorruptBundle for a version that fails its self-test.
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
        return list(self._planes)

    def ready(self) -> bool:
        return self.state.loaded

    def find(self, name: str, version: str | None = None) -> Endpoint:
        """Return the endpoint of a version, given by number or alias; the default when None.

        Raises NotFound, or Unavailable while the model is unloaded.
        """
        state = self.state
        if name != state.name:
            raise NotFound(
                f"model '{name[:100]}' is not served here; GET /v2/models lists what is."
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
                f"version '{str(version)[:100]}' of '{name}' is not served; {known} are."
            )
        return endpoint

    async def install(self, state: ServingState) -> None:
        """Change to another state; requests in progress finish with the version they have.

        Raises CorruptBundle, and nothing has changed, for a version that fails its self-test.
        """
        self._adopt(state, await asyncio.to_thread(self._load_missing, state))

    def report(self) -> ReplicaReport:
        """Return what was observed since the last report."""
        blocks = {
            version: plane.sampler.drained()
            for version, plane in self._planes.items()
            if plane.sampler is not None
        }
        return self._pipeline.reports.drain(blocks)

    async def close(self) -> None:
        """Write the rest of the request log."""
        await self._pipeline.close()

    def num_rows(self) -> int:
        """Return the number of rows in progress."""
        return sum(plane.batcher.rows for plane in self._planes.values())

    def engine_s(self) -> float:
        """Return for how long engines were busy until now, with the batches that run."""
        planes = self._planes.values()
        return sum(plane.metrics.engine_s + plane.batcher.running_s for plane in planes)

    def num_refused(self) -> int:
        """Return how many requests were refused until now as there was too much to do."""
        planes = self._planes.values()
        return sum(plane.metrics.refused[reason] for plane in planes for reason in LOAD_REASONS)

    def num_responses(self) -> int:
        """Return how many requests were answered until now."""
        planes = self._planes.values()
        return sum(sum(plane.metrics.requests.values()) for plane in planes)

    def snapshot(self, replica: str) -> Snapshot:
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
