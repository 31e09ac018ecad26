"""What a replica serves: the versions of one model, side by side, and which of them is meant."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.dataplane import DataPlane
from serve.errors import NotFound, Unavailable
from serve.metrics import Snapshot, merged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A candidate that is tried on a share of the requests. phase: "shadow" or "canary"."""

    candidate: str
    phase: str
    share: float


@dataclass(frozen=True)
class State:
    """What is to be served. revision: counts the changes. default: the version of no version.

    locations: version → location of its bundle. aliases: alias → version.
    """

    revision: int
    name: str
    default: str
    locations: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    loaded: bool = True
    trial: Trial | None = None


class Served:
    """The planes of a model. Belongs to one event loop."""

    def __init__(self, state: State, load: Callable[[str, str], DataPlane]) -> None:
        """load: (location, version) → a plane whose golden self-test passed and that is warm.

        Raises CorruptBundle for a version that does not answer as it did.
        """
        self._load = load
        self._locations: dict[str, str] = {}
        self._planes: dict[str, DataPlane] = {}
        self.state = state
        self._adopt(state, self._missing(state))

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def versions(self) -> list[str]:
        return list(self._planes)

    def ready(self) -> bool:
        return self.state.loaded

    def find(self, name: str, version: str | None = None) -> DataPlane:
        """Return the plane of a version, given by number or alias; the default when None.

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
        if version is None:
            return self._planes[state.default]
        plane = self._planes.get(state.aliases.get(version, version))
        if plane is None:
            known = ", ".join([*self._planes, *state.aliases])
            raise NotFound(f"version '{version[:100]}' of '{name}' is not served; {known} are.")
        return plane

    async def install(self, state: State) -> None:
        """Go over to another state; requests in progress are finished by the plane they have.

        Raises CorruptBundle, and nothing has changed, for a version that fails its self-test.
        """
        self._adopt(state, await asyncio.to_thread(self._missing, state))

    def planes(self) -> dict[str, DataPlane]:
        """The planes by version."""
        return dict(self._planes)

    def rows(self) -> int:
        """Rows in progress."""
        return sum(plane.batcher.rows for plane in self._planes.values())

    def engine_s(self) -> float:
        """For how long engines were busy until now."""
        return sum(plane.metrics.engine_s for plane in self._planes.values())

    def answers(self) -> int:
        """How many requests were answered until now."""
        planes = self._planes.values()
        return sum(sum(plane.metrics.requests.values()) for plane in planes)

    def snapshot(self, replica: str) -> Snapshot:
        return merged(plane.snapshot(replica=replica) for plane in self._planes.values())

    def _missing(self, state: State) -> dict[str, DataPlane]:
        """Load what a state has and this one has not."""
        known = self._locations.items()
        return {
            version: self._load(location, version)
            for version, location in state.locations.items()
            if state.loaded and (version, location) not in known
        }

    def _adopt(self, state: State, planes: dict[str, DataPlane]) -> None:
        wanted = state.locations if state.loaded else {}
        before = self._planes
        self._planes = {version: planes.get(version) or before[version] for version in wanted}
        self._locations = dict(wanted)
        self.state = state
        logger.info("serving %s versions %s, default %s", state.name, list(wanted), state.default)
