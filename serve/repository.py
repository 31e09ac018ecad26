"""The repository: which versions of a model its replicas serve, and how that changes.

One per application. It alone asks the registry; replicas ask it, and wait for changes.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from cluster.errors import UserError
from serve.access import Actor
from serve.audit import AuditLog
from serve.config import ServeConfig, allow
from serve.errors import BadRequest, NotFound, RequestError, Unavailable
from serve.metrics import Snapshot, merged
from serve.monitor.conductor import Conductor
from serve.monitor.overseer import Report
from serve.served import State
from train.bundle import Bundle, CorruptBundle, Predictor, registry

# How long a replica waits for a change before it asks again.
POLL_S = 4.0
# A replica that has not asked for this long is gone.
FORGET_S = 20.0
# How long a load waits for every replica that lives to serve what was loaded.
SWITCH_S = 300.0

STAYS = "What was served before still is."

logger = logging.getLogger(__name__)


@dataclass
class Replica:
    """What a replica said when it asked last.

    revision: of the state that it was given. problem: why it could not go over to that one, and
    serves the one before. at: of the monotonic clock.
    """

    revision: int
    problem: str | None
    metrics: Snapshot
    at: float


def resolve(config: ServeConfig, revision: int = 0) -> State:
    """Ask the registry for what a configuration names. Raises UserError, CorruptBundle."""
    root = storage.resolve(config.storage)
    locations: dict[str, str] = {}
    aliases: dict[str, str] = {}
    names = []
    for reference in config.references:
        bundle, version = registry.load(reference, root)
        locations[version] = bundle.location
        names.append(bundle.manifest.name)
        if "@" in reference:
            aliases[reference.rpartition("@")[2]] = version
    return State(revision, names[0], next(iter(locations)), locations, aliases)


class Repository:
    """Keeps the state that replicas follow. Belongs to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        state: State,
        find: Callable[[ServeConfig, int], State] = resolve,
    ) -> None:
        """state: what was to be served when the application was deployed."""
        self._config = config
        allow(config.plugins, config.storage)
        self._find = find
        self.current = state
        self._changed = asyncio.Event()
        self._replicas: dict[str, Replica] = {}
        self.loading = asyncio.Lock()
        self._audit = AuditLog(storage.resolve(config.storage), state.name)
        self.conductor = Conductor(self, config, state.name, self._audit)

    async def state(self) -> State:
        return self.current

    async def follow(
        self,
        replica: str,
        serves: State,
        revision: int,
        problem: str | None,
        metrics: Snapshot,
        report: Report,
    ) -> State | None:
        """Return the state once it is another than `revision`, or None after a while.

        serves: the replica's own state. report: what it saw since it asked last. For the others
        see Replica.
        """
        self._replicas[replica] = Replica(revision, problem, metrics, time.monotonic())
        self.conductor.begin()
        self.conductor.report(report)
        if revision > self.current.revision:
            # After a crash of this process the replicas know better.
            self.current = replace(serves, revision=revision)
        if self.current.revision == revision:
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except TimeoutError:
                return None
        return self.current if self.current.revision != revision else None

    async def hear(self) -> None:
        """Return once each replica that lives has reported anew."""
        asked = time.monotonic()
        self._wake()
        while any(known.at < asked for known in self._alive().values()):
            # One that is going over to another state only beats.
            if time.monotonic() > asked + 2 * POLL_S:
                return
            await asyncio.sleep(0.02)

    async def beat(self, replica: str, report: Report) -> None:
        """A replica that is going over to another state still lives, and answers."""
        self.conductor.report(report)
        if replica in self._replicas:
            self._replicas[replica].at = time.monotonic()

    async def metrics(self) -> Snapshot:
        """Return what all replicas counted, some seconds ago at most, and what it tells."""
        counted = [replica.metrics for replica in self._alive().values()]
        return merged([*counted, self.conductor.overseer.snapshot()])

    async def stats(self) -> dict[str, Any]:
        """What the monitor and the rollout tell; see `Conductor.stats`."""
        return self.conductor.stats()

    async def feedback(
        self, name: str, request_id: str, truths: Sequence[Any], actor: Actor
    ) -> dict[str, Any]:
        """Take the truth of a request's records. Raises NotFound, BadRequest."""
        self._check(name)
        async with self._audited("feedback", actor, {"of": request_id, "rows": len(truths)}):
            return await self.conductor.feedback(request_id, truths)

    async def index(self) -> list[dict[str, Any]]:
        """Return name, version and state of what is served."""
        state = self.current
        return [
            {
                "name": state.name,
                "version": version,
                "state": "READY" if state.loaded else "UNAVAILABLE",
                "reason": "" if state.loaded else "unloaded",
                "aliases": [alias for alias, number in state.aliases.items() if number == version],
                "default": version == state.default,
            }
            for version in state.locations
        ]

    async def load(self, name: str, actor: Actor) -> dict[str, Any]:
        """Serve what the registry has now. The old state stays unless every new version is fit.

        Raises NotFound for another model, BadRequest for a version that fails its self-test.
        """
        self._check(name)
        details: dict[str, Any] = {}
        async with self._audited("load", actor, details), self.loading:
            before = self.current
            try:
                state = await asyncio.to_thread(self.find_now)
                new = [
                    state.locations[version]
                    for version in state.locations
                    if state.locations[version] not in before.locations.values()
                ]
                await asyncio.to_thread(self.check_fit, new)
            except (UserError, CorruptBundle, ValueError) as error:
                raise BadRequest(f"{error} {STAYS}") from error
            except Exception as error:
                logger.exception("the registry or its storage failed")
                raise Unavailable(f"the registry cannot be read now. {STAYS}", 10) from error
            if replace(state, revision=before.revision) != before:
                await self.publish(state)
            details |= {"versions": list(state.locations), "default": state.default}
            return {"name": name, **details}

    async def unload(self, name: str, actor: Actor) -> None:
        """Answer 503 until it is loaded again. Raises NotFound for another model."""
        self._check(name)
        async with self._audited("unload", actor, {}), self.loading:
            state = self.current
            await self.publish(replace(state, revision=state.revision + 1, loaded=False))

    @asynccontextmanager
    async def _audited(
        self, action: str, actor: Actor, details: dict[str, Any]
    ) -> AsyncIterator[None]:
        """Write what the block does, and whether it is done, to the audit log."""
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except RequestError as error:
            outcome = f"refused: {error}"
            raise
        finally:
            await self._audit.add(action, actor, outcome, **details)

    def _check(self, name: str) -> None:
        if name != self.current.name:
            raise NotFound(f"model '{name[:100]}' is not served here.")

    def find_now(self) -> State:
        """What the registry has, as the next state. Raises UserError, CorruptBundle."""
        return self._find(self._config, self.current.revision + 1)

    def check_fit(self, locations: Sequence[str]) -> None:
        """Raises CorruptBundle or ValueError for a bundle that no replica could serve."""
        for location in locations:
            bundle = Bundle.load(location)
            if bundle.manifest.name != self.current.name:
                raise CorruptBundle(f"'{location}' is of another model.")
            Predictor.load(bundle, self._config.variant, num_threads=self._config.threads)

    async def publish(self, state: State) -> None:
        """Tell the replicas, and wait until those that live have gone over.

        Raises BadRequest, and the state before is published again, if one of them cannot.
        """
        before = self.current
        self._tell(state)
        deadline = time.monotonic() + SWITCH_S
        while True:
            replicas = self._alive().values()
            told = [known for known in replicas if known.revision == state.revision]
            problem = next((known.problem for known in told if known.problem), None)
            if problem is None and len(told) == len(replicas):
                return
            if problem is None and time.monotonic() > deadline:
                problem = f"not every replica could go over within {SWITCH_S:g} s."
            if problem is not None:
                self._tell(replace(before, revision=state.revision + 1))
                raise BadRequest(f"{problem} {STAYS}")
            await asyncio.sleep(0.02)

    def _tell(self, state: State) -> None:
        self.current = state
        self._wake()

    def _wake(self) -> None:
        """Let replicas that wait for a change ask again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _alive(self) -> dict[str, Replica]:
        now = time.monotonic()
        self._replicas = {
            name: known for name, known in self._replicas.items() if now - known.at < FORGET_S
        }
        return self._replicas
