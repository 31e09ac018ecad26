"""Brings what is served to what the registry says, and runs rollouts.

Everything here may be repeated: a process that is killed at any point, or for which a step fails,
reaches the same state by doing it again. What is decided once is written down first.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.errors import CommandFailed, UserError
from serve.config import ServeConfig
from serve.control.desired_state import Transition
from serve.control.state_publisher import UNCHANGED, StatePublisher
from serve.errors import BadRequest, RequestError, Unavailable
from serve.rollout.aggregator import MetricsAggregator
from serve.rollout.controller import NextPhase, RolloutController, RolloutStep, StartRollout
from serve.rollout.verdict import REFUSED, RolloutVerdict
from serve.state import ServingState
from train.bundle import Bundle, CorruptBundle, Predictor, registry
from train.bundle.manifest import interface_change

# How often the registry's aliases are compared with what is served.
FOLLOW_S = 5.0
# When a version that could not be served is tried again.
RETRY_S = 60.0

logger = logging.getLogger(__name__)


def resolve_serving_state(config: ServeConfig) -> ServingState:
    """Look up in the registry what a configuration names.

    Raises UserError, CorruptBundle, RegistryError.
    """
    locations: dict[str, str] = {}
    aliases: dict[str, str] = {}
    names = []
    for reference in config.references:
        bundle, version = registry.load_bundle(reference, config.storage)
        locations[version] = bundle.location
        names.append(bundle.manifest.name)
        if "@" in reference:
            aliases[reference.rpartition("@")[2]] = version
    return ServingState(0, names[0], next(iter(locations)), locations, aliases)


class Reconciler:
    """Changes the serving state. Its methods are called while nothing else changes it."""

    def __init__(
        self,
        config: ServeConfig,
        publisher: StatePublisher,
        aggregator: MetricsAggregator,
        rollouts: RolloutController,
        resolve: Callable[[ServeConfig], ServingState] = resolve_serving_state,
        reached: Callable[[Transition], None] = lambda transition: None,
    ) -> None:
        self._config, self._publisher, self._aggregator = config, publisher, aggregator
        self._rollouts, self._resolve, self._reached = rollouts, resolve, reached
        self._aliases = {
            reference.rpartition("@")[2] for reference in config.references if "@" in reference
        }
        self._followed = -FOLLOW_S
        # What the registry said when that could not be served, and when.
        self._refused: tuple[dict[str, str], float] = {}, 0.0
        self._problem = ""

    @property
    def _current(self) -> ServingState:
        return self._publisher.current

    async def reconcile(self) -> None:
        """Carry out what was decided; else serve what the registry's aliases name by now.

        What is not possible now is logged, once, and tried again next time.
        """
        problem = ""
        try:
            await self._reconcile()
        except (RequestError, CommandFailed) as error:
            problem = str(error)
        if problem and problem != self._problem:
            logger.error("%s: the serving state cannot be changed: %s", self._current.name, problem)
        self._problem = problem

    async def _reconcile(self) -> None:
        rollout = self._current.rollout
        if rollout is not None and not self._aggregator.compares(rollout.candidate):
            # This process was started again; the phase begins again.
            self._aggregator.begin(rollout.candidate)
        await self._publisher.settle()
        if self._publisher.decision is not None:
            await self._carry_out()
        elif self._aliases and time.monotonic() - self._followed >= FOLLOW_S:
            self._followed = time.monotonic()
            await self._follow_registry()

    async def load(self, *, allow_interface_change: bool) -> None:
        """Serve what the registry has now.

        Raises BadRequest for a version that is unfit, Unavailable where that is not known now.
        """
        if self._publisher.decision is not None:
            await self._carry_out()
        state = await self._resolved()
        await self._check(state, allow_interface_change=allow_interface_change)
        await self._publish(state)

    async def unload(self) -> None:
        await self._publisher.publish(replace(self._current, loaded=False))

    async def apply(self, step: RolloutStep) -> None:
        """Take a step of a rollout."""
        state = self._current
        match step:
            case StartRollout():
                await self._start_rollout(step)
            case NextPhase(rollout, reason):
                logger.info("candidate %s is now %s: %s", rollout.candidate, rollout.phase, reason)
                self._aggregator.begin(rollout.candidate)
                await self._publisher.publish(replace(state, rollout=rollout))
            case _:
                await self._end_rollout(step.candidate, step.verdict)

    async def _end_rollout(self, candidate: str, verdict: RolloutVerdict) -> None:
        await self._publisher.decide(self._rollouts.decide(self._current, candidate, verdict))
        await self._carry_out()

    async def _carry_out(self) -> None:
        """Do what was decided of a candidate, or the rest of it."""
        decision = self._publisher.decision
        assert decision is not None
        try:
            await self._rollouts.register(decision)
        except CommandFailed as error:
            raise Unavailable(f"{error} {UNCHANGED}", 10) from error
        except registry.ProductionChanged as error:
            logger.warning("candidate %s is compared again: %s", decision.version, error)
        else:
            self._reached(Transition.REGISTERED)
            await self._rollouts.announce(decision)
            self._reached(Transition.AUDITED)
        try:
            new = replace(await self._resolved(), loaded=self._current.loaded)
            await self._check(new, allow_interface_change=False)
        except BadRequest as error:
            # Something else in the registry is unfit, which is no reason to keep the rollout.
            logger.error("%s", error)
            new = _without_rollout(self._current)
        await self._publish(new, decided=True)

    async def _follow_registry(self) -> None:
        found = await asyncio.to_thread(
            registry.alias_versions, self._config.storage, self._current.name
        )
        state = self._current
        named = {alias: found[alias] for alias in self._aliases if alias in found}
        rollout = state.rollout
        if named.items() <= state.aliases.items() and (
            rollout is None or found.get(registry.CANDIDATE) == rollout.candidate
        ):
            return
        refused, at = self._refused
        if named == refused and time.monotonic() - at < RETRY_S:
            return
        try:
            new = replace(await self._resolved(), loaded=state.loaded)
            await self._check(new, allow_interface_change=False)
            await self._publish(new)
        except BadRequest:
            self._refused = named, time.monotonic()
            raise

    async def _resolved(self) -> ServingState:
        """Raises BadRequest, Unavailable."""
        try:
            state = await asyncio.to_thread(self._resolve, self._config)
        except (UserError, CorruptBundle, ValueError) as error:
            raise BadRequest(f"{error} {UNCHANGED}") from error
        except CommandFailed as error:
            raise Unavailable(f"{error} {UNCHANGED}", 10) from error
        except Exception as error:
            logger.exception("the registry or its storage failed")
            raise Unavailable(f"the registry cannot be read now. {UNCHANGED}", 10) from error
        self._reached(Transition.RESOLVED)
        return state

    async def _check(self, state: ServingState, *, allow_interface_change: bool) -> None:
        """Raises BadRequest for a state that no replica could serve, or that clients cannot use."""
        before = self._current
        new = [each for each in state.locations.values() if each not in before.locations.values()]
        try:
            await asyncio.to_thread(self._check_bundles, new)
            change = await asyncio.to_thread(_interface_change, before, state)
        except (UserError, CorruptBundle, ValueError) as error:
            raise BadRequest(f"{error} {UNCHANGED}") from error
        if change and not allow_interface_change:
            raise BadRequest(
                f"version {state.default} is not served, as {change} from version "
                f"{before.default}; load it with the parameter allow_interface_change if its "
                f"clients know. {UNCHANGED}"
            )
        self._reached(Transition.CHECKED)

    def _check_bundles(self, locations: Sequence[str]) -> None:
        """Raises CorruptBundle or ValueError for a bundle that no replica could serve."""
        for location in locations:
            bundle = Bundle.load(location)
            if bundle.manifest.name != self._current.name:
                raise CorruptBundle(f"'{location}' is of another model.")
            Predictor.load(bundle, self._config.variant, num_threads=self._config.threads)

    async def _publish(self, state: ServingState, *, decided: bool = False) -> None:
        """Publish a state that the registry has; a rollout that it does not have ends."""
        rollout = self._current.rollout
        await self._publisher.publish(state, decided=decided)
        if rollout is not None:
            self._aggregator.end()

    async def _start_rollout(self, step: StartRollout) -> None:
        """Load a candidate on the replicas; refuse one that does not fit."""
        state, candidate = self._current, step.rollout.candidate
        new = replace(
            state,
            locations={**state.locations, candidate: step.location},
            aliases={**state.aliases, registry.CANDIDATE: candidate},
            rollout=step.rollout,
        )
        try:
            await self._check(replace(new, default=candidate), allow_interface_change=False)
            # Before its first response arrives.
            self._aggregator.begin(candidate)
            await self._publisher.publish(new)
        except BadRequest as error:
            self._aggregator.end()
            await self._end_rollout(candidate, RolloutVerdict(REFUSED, str(error)))
        logger.info("candidate %s: %s", candidate, self._current.rollout)


def _without_rollout(state: ServingState) -> ServingState:
    if state.rollout is None:
        return state
    kept = {
        version: location
        for version, location in state.locations.items()
        if version != state.rollout.candidate
    }
    aliases = {alias: version for alias, version in state.aliases.items() if version in kept}
    return replace(state, locations=kept, aliases=aliases, rollout=None)


def _interface_change(before: ServingState, after: ServingState) -> str | None:
    locations = before.locations[before.default], after.locations[after.default]
    if locations[0] == locations[1]:
        return None
    one, other = (Bundle.load(location).manifest for location in locations)
    return interface_change(one, other)
