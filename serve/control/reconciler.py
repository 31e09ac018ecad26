"""The reconciler: makes the serving state follow the registry, and carries out rollouts.

All steps are idempotent: after a crash or a failed step, repeating them leads to the same state.
Decisions, which must not be repeated, are stored before they are carried out.
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

# Seconds between comparisons of the registry's aliases with the served versions.
FOLLOW_S = 5.0
# Seconds after which a version that could not be served is tried again.
RETRY_S = 60.0

logger = logging.getLogger(__name__)


def resolve_serving_state(config: ServeConfig) -> ServingState:
    """Resolve a configuration's references to versions in the registry.

    Raises UserError if a reference cannot be resolved, CorruptBundle, RegistryError.
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
    """Changes the serving state. Callers hold the publisher's lock `changing`."""

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
        # The aliases (alias → version) that could not be served, and the time of that attempt.
        self._refused: tuple[dict[str, str], float] = {}, 0.0
        self._problem = ""

    @property
    def _current(self) -> ServingState:
        return self._publisher.current

    async def reconcile(self) -> None:
        """Carry out a pending decision, or else serve the versions that the aliases name now.

        A failure is logged once, and the next call tries again.
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
            # This process was restarted, so the phase starts again.
            self._aggregator.begin(rollout.candidate)
        await self._publisher.settle()
        if self._publisher.decision is not None:
            await self._carry_out()
        elif self._aliases and time.monotonic() - self._followed >= FOLLOW_S:
            self._followed = time.monotonic()
            await self._follow_registry()

    async def load(self, *, allow_interface_change: bool) -> None:
        """Serve the versions that the registry names now.

        Raises BadRequest if a version cannot be served, Unavailable if the registry or its storage
        cannot be reached.
        """
        if self._publisher.decision is not None:
            await self._carry_out()
        state = await self._resolved()
        await self._check(state, allow_interface_change=allow_interface_change)
        await self._publish(state)

    async def unload(self) -> None:
        """Stop serving the model. Raises BadRequest or Unavailable."""
        await self._publisher.publish(replace(self._current, loaded=False))

    async def apply(self, step: RolloutStep) -> None:
        """Carry out a step of a rollout."""
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
        """Carry out a decision about a candidate, or the steps of it that are left."""
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
            # Another version in the registry cannot be served; the rollout ends nevertheless.
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
        """Return the state that the registry has now. Raises BadRequest or Unavailable."""
        try:
            state = await asyncio.to_thread(self._resolve, self._config)
        except (UserError, CorruptBundle, ValueError) as error:
            raise BadRequest(f"{error} {UNCHANGED}") from error
        except CommandFailed as error:
            raise Unavailable(f"{error} {UNCHANGED}", 10) from error
        except Exception as error:
            logger.exception("the registry or its storage failed")
            raise Unavailable(f"the registry cannot be read. {UNCHANGED}", 10) from error
        self._reached(Transition.RESOLVED)
        return state

    async def _check(self, state: ServingState, *, allow_interface_change: bool) -> None:
        """Check a new state.

        Raises BadRequest if no replica could serve it, or if its interface differs from the old
        one and `allow_interface_change` is false.
        """
        before = self._current
        new = [each for each in state.locations.values() if each not in before.locations.values()]
        try:
            await asyncio.to_thread(self._check_bundles, new)
            change = await asyncio.to_thread(_interface_change, before, state)
        except (UserError, CorruptBundle, ValueError) as error:
            raise BadRequest(f"{error} {UNCHANGED}") from error
        if change and not allow_interface_change:
            raise BadRequest(
                f"version {state.default} is not served, because {change} from version "
                f"{before.default}. If its clients support this, load it with the parameter "
                f"allow_interface_change. {UNCHANGED}"
            )
        self._reached(Transition.CHECKED)

    def _check_bundles(self, locations: Sequence[str]) -> None:
        """Raise CorruptBundle or ValueError if no replica could serve one of the bundles."""
        for location in locations:
            bundle = Bundle.load(location)
            if bundle.manifest.name != self._current.name:
                raise CorruptBundle(
                    f"'{location}' is of model '{bundle.manifest.name}'; expected "
                    f"'{self._current.name}'."
                )
            Predictor.load(bundle, self._config.variant, num_threads=self._config.threads)

    async def _publish(self, state: ServingState, *, decided: bool = False) -> None:
        """Publish a state from the registry, which ends the rollout in progress."""
        rollout = self._current.rollout
        await self._publisher.publish(state, decided=decided)
        if rollout is not None:
            self._aggregator.end()

    async def _start_rollout(self, step: StartRollout) -> None:
        """Load a candidate on the replicas; reject it if it cannot be served."""
        state, candidate = self._current, step.rollout.candidate
        new = replace(
            state,
            locations={**state.locations, candidate: step.location},
            aliases={**state.aliases, registry.CANDIDATE: candidate},
            rollout=step.rollout,
        )
        try:
            await self._check(replace(new, default=candidate), allow_interface_change=False)
            # Before the first observations of the candidate arrive.
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
