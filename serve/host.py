"""What the protocols have in common: who may ask, for what, on which terms, and of which plane."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster import storage
from serve import admission
from serve.access import Actor, Guard
from serve.admission import Terms
from serve.config import ServeConfig
from serve.dataplane import DataPlane
from serve.metrics import Snapshot, merged
from serve.monitor.feedback import Prediction, predictions_of
from serve.monitor.logrows import Entry
from serve.monitor.overseer import Report
from serve.monitor.requestlog import RequestLog, options
from serve.monitor.trial import Trials
from serve.security import Key, Keys
from serve.served import Served
from train.tasks import Arrays, Columns

# Answers kept until the repository is told of them; then the oldest are forgotten.
MAX_ANSWERED = 50_000


class Repository(Protocol):
    """What answers for all replicas of a model. These raise RequestError."""

    async def index(self) -> list[dict[str, Any]]: ...
    async def stats(self) -> dict[str, Any]: ...
    async def feedback(
        self, name: str, request_id: str, truths: Sequence[Any], actor: Actor
    ) -> dict[str, Any]: ...
    async def load(self, name: str, actor: Actor) -> dict[str, Any]: ...
    async def unload(self, name: str, actor: Actor) -> None: ...
    async def metrics(self) -> Snapshot: ...


class Host:
    """A replica's model, as its clients may use it."""

    def __init__(
        self,
        served: Served,
        config: ServeConfig,
        repository: Repository,
        keys: Keys | None = None,
        *,
        loopback: bool = True,
    ) -> None:
        """loopback: whether only this machine reaches the server."""
        self.guard = Guard(
            keys,
            loopback=loopback,
            open_metrics=config.open_metrics,
            hosts=config.security.allowed_hosts,
            own_name=config.host,
        )
        self._served = served
        self.config = config
        self.repository = repository
        self._log: RequestLog | None = None
        if config.log_share:
            self._log = RequestLog(storage.resolve(config.storage), served.name, options(config))
        self._answered: deque[tuple[str, str, list[Prediction]]] = deque(maxlen=MAX_ANSWERED)
        self._trials = Trials(self._remember, config.timeout_s)

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

    def find(self, name: str, version: str | None = None) -> DataPlane:
        """Raises NotFound, Unavailable."""
        return self._served.find(name, version)

    async def infer(
        self,
        plane: DataPlane,
        columns: Columns,
        terms: Terms,
        request_id: str,
        *,
        named: bool,
    ) -> tuple[DataPlane, Arrays]:
        """Return predictions, a row for each record, and the plane that they are of.

        plane: what was asked; where a candidate is tried, that one may answer. named: whether the
        request names a version, which then answers. Raises what `DataPlane.infer` does.
        """
        began, began_wall = time.perf_counter(), time.time()
        trial = self._served.state.trial
        tried = None if trial is None or named else self._served.planes().get(trial.candidate)
        if trial is None or tried is None or tried is plane:
            predictions = await plane.infer(columns, terms)
        else:
            plane, predictions = await self._trials.infer(
                trial, (plane, tried), columns, terms, terms.client or request_id, request_id
            )
        if self._log is not None and self._log.wants(request_id):
            self._remember(request_id, plane.version, predictions)
            seconds = time.perf_counter() - began
            self._log.add(
                Entry(
                    request_id,
                    plane.version,
                    plane.variant,
                    began_wall,
                    seconds,
                    columns,
                    predictions,
                    plane.fields,
                )
            )
        return plane, predictions

    async def close(self) -> None:
        """Write what is left of the log."""
        if self._log is not None:
            await self._log.close()

    def report(self) -> Report:
        """What was seen since it was asked last."""
        planes = self._served.planes()
        blocks = {
            version: plane.sampler.drained()
            for version, plane in planes.items()
            if plane.sampler is not None
        }
        answered = list(self._answered)
        self._answered.clear()
        return Report(blocks, answered, self._trials.drained())

    def _remember(self, request_id: str, version: str, predictions: Arrays) -> None:
        if self._log is not None and self._log.wants(request_id):
            self._answered.append((request_id, version, predictions_of(predictions)))

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

    async def index(self, key: Key | None) -> list[dict[str, Any]]:
        """The versions of the models that a key may ask; of all without one."""
        models = await self.repository.index()
        return [model for model in models if key is None or key.sees(model["name"])]

    def snapshot(self, replica: str) -> Snapshot:
        """What the replica counted."""
        served = self._served.snapshot(replica)
        if self._log is None:
            return served
        return merged([served, self._log.snapshot({"model": self.name, "replica": replica})])
