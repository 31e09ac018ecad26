"""What the protocols have in common: who may ask, for what, on which terms, and of which plane."""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from serve import admission
from serve.admission import Terms
from serve.config import ServeConfig
from serve.dataplane import DataPlane
from serve.metrics import Snapshot
from serve.security import Key, Keys, check_scope
from serve.served import Served


class Repository(Protocol):
    """What answers for all replicas of a model. These raise RequestError."""

    async def index(self) -> list[dict[str, Any]]: ...
    async def load(self, name: str) -> dict[str, Any]: ...
    async def unload(self, name: str) -> None: ...
    async def metrics(self) -> Snapshot: ...


class Host:
    """A replica's model, as its clients may use it."""

    def __init__(
        self, served: Served, config: ServeConfig, repository: Repository, keys: Keys | None = None
    ) -> None:
        self._served = served
        self.config = config
        self.repository = repository
        self.keys = keys

    @property
    def name(self) -> str:
        return self._served.name

    @property
    def versions(self) -> list[str]:
        return self._served.versions

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self._served.ready()

    def key(self, authorization: str | None) -> Key | None:
        """Return whose key came; None where none is needed. Raises Unauthorized, RateLimited."""
        if self.keys is None:
            return None
        return self.keys.check(authorization, asyncio.get_running_loop().time())

    def admit(self, metadata: Mapping[str, str], model: str | None, *, admin: bool) -> str:
        """Return the client's name. Raises Unauthorized, RateLimited, Forbidden."""
        key = self.key(metadata.get("authorization"))
        if model is not None:
            check_scope(key, model, admin=admin)
        return key.name if key else metadata.get("x-client-id", "")

    def find(self, name: str, version: str | None = None) -> DataPlane:
        """Raises NotFound, Unavailable."""
        return self._served.find(name, version)

    def terms(
        self, parameters: Mapping[str, Any], client: str, timeout_s: float | None = None
    ) -> Terms:
        """Return what a request is granted. Raises BadRequest.

        timeout_s: what is left of the client's own deadline.
        """
        return admission.terms(
            parameters,
            now=asyncio.get_running_loop().time(),
            timeout_s=self.config.timeout_s,
            priorities=self.config.priorities,
            client=client,
            asked_s=timeout_s,
        )

    async def index(self) -> list[dict[str, Any]]:
        return await self.repository.index()

    async def load(self, name: str) -> dict[str, Any]:
        return await self.repository.load(name)

    async def unload(self, name: str) -> None:
        await self.repository.unload(name)

    def snapshot(self, replica: str) -> Snapshot:
        return self._served.snapshot(replica)
