"""The repository: the versions that a model's replicas serve, and changes to them.

There is one repository per model. Only the repository reads the registry; replicas follow the state
that it publishes.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from serve.access import Actor
from serve.audit import AuditLog
from serve.config import ServeConfig, set_bundle_policy
from serve.control.desired_state import DesiredStateStore, Transition
from serve.control.reconciler import Reconciler, resolve_serving_state
from serve.control.state_publisher import StatePublisher
from serve.errors import NotFound, RequestError
from serve.rollout import aggregator
from serve.rollout.aggregator import MetricsAggregator, ReplicaReport
from serve.rollout.controller import RolloutController
from serve.rollout.feedback_receiver import START_S, FeedbackReceiver
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot, merge_samples

# Seconds between searches for a candidate in the registry, and between evaluations of a rollout.
TICK_S = 2.0

logger = logging.getLogger(__name__)


class Repository:
    """Changes the serving state, on request and by rollouts. Belongs to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        state: ServingState,
        resolve: Callable[[ServeConfig], ServingState] = resolve_serving_state,
        reached: Callable[[Transition], None] = lambda transition: None,
    ) -> None:
        """Restore the state from before a crash, if there was one.

        state: the state when the application was deployed. resolve: config → the state that the
        registry has now. reached: called after each transition of the serving state. Raises OSError
        if the state from before a crash cannot be read.
        """
        self._config, self._name = config, state.name
        set_bundle_policy(config.plugins, config.storage, config.security.require_signature)
        self._root = config.storage
        self._audit = AuditLog(self._root, state.name)
        self._publisher = StatePublisher(DesiredStateStore(self._root, state), reached)
        self._aggregator = MetricsAggregator(config, state.name)
        self._feedback = FeedbackReceiver(config, state.name, self._aggregator)
        self._rollouts = RolloutController(config, state.name, self._aggregator, self._audit)
        self._reconciler = Reconciler(
            config, self._publisher, self._aggregator, self._rollouts, resolve, reached
        )
        self._running: asyncio.Task[None] | None = None
        # Whether the monitor's state has changed since it was written; the last error in writing.
        self._unsaved, self._problem = False, ""

    @property
    def current(self) -> ServingState:
        """The state that replicas should serve."""
        return self._publisher.current

    async def state(self) -> ServingState:
        """Return the state that replicas should serve."""
        return self.current

    async def close(self) -> None:
        """Write the feedback that is still in memory."""
        await self._feedback.close()

    async def follow(
        self, replica: str, known: tuple[str, int], problem: str | None, metrics: Snapshot
    ) -> ServingState | None:
        """Return a state other than `known` to a replica; see `StatePublisher.follow`."""
        if self._running is None:
            # Monitoring starts with the first replica.
            self._running = asyncio.create_task(self._run())
        return await self._publisher.follow(replica, known, problem, metrics)

    async def keep_alive(self, replica: str) -> None:
        """Keep a replica from being considered dead while it installs another state."""
        self._publisher.keep_alive(replica)

    async def leave(self, replica: str) -> None:
        """Remove a replica that is about to exit, so that no change waits for it."""
        self._publisher.leave(replica)

    async def collect(self, report: ReplicaReport) -> None:
        """Add a replica's observations, once the first version is monitored."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._aggregator.started.wait(), START_S)
        self._unsaved |= self._aggregator.collect(report)

    async def metrics(self) -> Snapshot:
        """Return the metrics of all replicas (a few seconds old at most), drift and feedback."""
        counted = [replica.metrics for replica in self._publisher.living().values()]
        return merge_samples([*counted, self._aggregator.snapshot()])

    async def stats(self) -> dict[str, Any]:
        """Return "monitor" by version, the "rollout" in progress, and "decisions"."""
        return {"monitor": self._aggregator.stats(), **self._rollouts.stats(self.current)}

    async def feedback(
        self,
        name: str,
        request_id: str,
        truths: Sequence[Any],
        actor: Actor,
        *,
        any_owner: str | None = None,
    ) -> dict[str, Any]:
        """Record the true label of each record of a request.

        request_id: the id with its owner, see `owned_id`. any_owner: the id alone, if the client
        may give feedback for the requests of every key. Raises NotFound for another model, and the
        errors of `FeedbackReceiver`.
        """
        self._check_name(name)
        async with self._audited("feedback", actor, {"of": request_id, "rows": len(truths)}):
            response = await self._feedback.receive(request_id, truths, any_owner)
            self._unsaved = True
            return response

    async def index(self) -> list[dict[str, Any]]:
        """Return the name, version and state of each served version."""
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

    async def load(
        self, name: str, actor: Actor, *, allow_interface_change: bool = False
    ) -> dict[str, Any]:
        """Serve the versions that the registry names now, if all of them can be served.

        Raises NotFound for another model, Unavailable if the registry cannot be read, BadRequest if
        a version fails its self-test, or has other inputs or outputs than before and
        `allow_interface_change` is false.
        """
        self._check_name(name)
        details: dict[str, Any] = {}
        async with self._audited("load", actor, details), self._publisher.changing:
            await self._reconciler.load(allow_interface_change=allow_interface_change)
            state = self.current
            details |= {"versions": list(state.locations), "default": state.default}
            return {"name": name, **details}

    async def unload(self, name: str, actor: Actor) -> None:
        """Unload the model: requests get 503 until a load. Raises NotFound for another model."""
        self._check_name(name)
        async with self._audited("unload", actor, {}), self._publisher.changing:
            await self._reconciler.unload()

    @contextlib.asynccontextmanager
    async def _audited(
        self, action: str, actor: Actor, details: dict[str, Any]
    ) -> AsyncIterator[None]:
        """Write an action and its outcome to the audit log."""
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except RequestError as error:
            outcome = f"refused: {error}"
            raise
        finally:
            await self._audit.add(action, actor, outcome, **details)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise NotFound(f"model '{name[:100]}' is not served here.")

    async def _run(self) -> None:
        """Monitor the served versions and run rollouts, until the process ends."""
        try:
            await self._rollouts.load_decisions()
        except Exception:
            logger.exception("earlier decisions cannot be read; continuing without them")
        while True:
            try:
                await self._tick()
            except Exception:
                logger.exception("the monitor failed; it tries again in %g s", TICK_S)
            await asyncio.sleep(TICK_S)

    async def _tick(self) -> None:
        async with self._publisher.changing:
            await self._reconciler.reconcile()
        state = self.current
        self._aggregator.retain(state.locations)
        for version, location in state.locations.items():
            if not self._aggregator.is_monitored(version):
                loaded = await asyncio.to_thread(aggregator.load_monitored, location, self._config)
                self._aggregator.monitor(version, *loaded)
        if self._unsaved:
            await self._save_monitor_state(state.default)
        step = await self._rollouts.next_step(state)
        if step is not None and self._publisher.decision is None:
            async with self._publisher.changing:
                if self.current is state:  # otherwise a load came first; the next tick decides
                    await self._reconciler.apply(step)

    async def _save_monitor_state(self, production: str) -> None:
        """Write the monitor's state; after a failure, the next tick tries again."""
        self._unsaved, problem = False, ""
        monitor_state = self._aggregator.state(production)
        try:
            await asyncio.to_thread(monitor_state.write, self._root, self._name)
        except OSError as error:
            self._unsaved, problem = True, str(error)
        if problem and problem != self._problem:
            logger.error("the monitor's state cannot be written: %s", problem)
        self._problem = problem
