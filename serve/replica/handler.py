"""Handling of inference requests, shared by all protocols: decoding, prediction and encoding."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from serve.access import Actor, Guard
from serve.config import ServeConfig
from serve.inference import request_options
from serve.inference.dataplane import DataPlane
from serve.inference.request_options import RequestOptions
from serve.protocol.v2 import InferRequest
from serve.replica.large_bodies import LargeBodyDecoder
from serve.replica.model_versions import ModelVersions
from serve.replica.pipeline import Endpoint
from serve.security import APIKey, KeyStore
from serve.telemetry.metrics import Snapshot
from serve.telemetry.recorder import RequestContext
from train.tasks import Arrays

T = TypeVar("T")


class RepositoryAPI(Protocol):
    """The repository's methods, which act on all replicas of a model. They raise RequestError."""

    async def index(self) -> list[dict[str, Any]]: ...
    async def stats(self) -> dict[str, Any]: ...
    async def feedback(
        self,
        name: str,
        request_id: str,
        truths: Sequence[Any],
        actor: Actor,
        *,
        any_owner: str | None = None,
    ) -> dict[str, Any]: ...
    async def load(
        self, name: str, actor: Actor, *, allow_interface_change: bool = False
    ) -> dict[str, Any]: ...
    async def unload(self, name: str, actor: Actor) -> None: ...
    async def metrics(self) -> Snapshot: ...


class InferenceHandler:
    """Handles the requests to a replica's model. The guard checks the access of clients."""

    def __init__(
        self,
        served: ModelVersions,
        config: ServeConfig,
        repository: RepositoryAPI,
        keys: KeyStore | None = None,
        *,
        loopback: bool = True,
    ) -> None:
        """Set up the guard. loopback: whether the server is reachable from this machine only."""
        self.guard = Guard(
            keys,
            loopback=loopback,
            metrics_without_key=config.security.metrics_without_key,
            hosts=config.security.allowed_hosts,
            own_name=config.host,
        )
        self._served = served
        self.config = config
        self.repository = repository
        self._large_bodies = LargeBodyDecoder(config.limits.max_pending_bytes)

    @property
    def name(self) -> str:
        return self._served.name

    @property
    def versions(self) -> list[str]:
        return self._served.versions

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        """Return whether the model is loaded."""
        return self._served.ready()

    def endpoint(self, name: str, version: str | None = None) -> Endpoint:
        """Return the endpoint of a version. Raises NotFound or Unavailable."""
        return self._served.find(name, version)

    async def infer(
        self,
        request: RequestContext,
        endpoint: Endpoint,
        decode: Callable[[], InferRequest],
        encode: Callable[[InferRequest, Arrays, DataPlane], T],
        timeout_s: float | None = None,
        *,
        sizes: tuple[int, int] = (0, 0),
    ) -> T:
        """Handle an inference request of any protocol; return the response that `encode` returns.

        decode: reads the body into records for the endpoint's version. encode: gets the request,
        the predictions (output → array of shape [N, …], one row per record) and the data plane
        that computed them, which may be the candidate's in a rollout. timeout_s: seconds until the
        client's deadline; None if there is none. sizes: bytes of the body, and the most of them
        that may need parsing. Raises the errors of `decode`, `DataPlane.predict` and
        `RequestContext.while_connected`.
        """
        began = time.perf_counter()
        inference = await self._large_bodies.decode(decode, *sizes)
        options = self._options(inference.parameters, request.client, timeout_s)
        request.rows = len(next(iter(inference.columns.values())))
        endpoint.plane.metrics.stages["parse"].observe(time.perf_counter() - began)
        plane, predictions = await request.while_connected(
            endpoint.predict(inference.columns, options, request.record_id)
        )
        request.metrics, request.version = plane.metrics, plane.version
        predicted = time.perf_counter()
        response = encode(inference, predictions, plane)
        plane.metrics.stages["reply"].observe(time.perf_counter() - predicted)
        return response

    def _options(
        self, parameters: Mapping[str, Any], client: str, timeout_s: float | None = None
    ) -> RequestOptions:
        """Return the deadline, priority and client of a request. Raises BadRequest.

        timeout_s: seconds until the client's own deadline; None if there is none.
        """
        return request_options.request_options(
            parameters,
            now=asyncio.get_running_loop().time(),
            timeout_s=self.config.limits.timeout_s,
            priorities=self.config.limits.priorities,
            client=client,
            asked_s=timeout_s,
        )

    async def index(self, key: APIKey | None) -> list[dict[str, Any]]:
        """Return the versions of the models that a key may use; of all models if it is None."""
        models = await self.repository.index()
        return [model for model in models if key is None or key.sees(model["name"])]

    def snapshot(self, replica: str) -> Snapshot:
        """Return the replica's metrics."""
        return self._served.snapshot(replica)
