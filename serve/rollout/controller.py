"""Runs the rollout of a candidate: finds it in the registry, judges it, promotes or rolls it back.

The controller returns the next step. The repository, which owns the serving state, carries it out
and calls the controller again to update the registry at the end of a rollout.
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from serve.audit import ROLLOUT, AuditLog
from serve.config import ServeConfig
from serve.rollout.aggregator import MetricsAggregator
from serve.rollout.verdict import PROMOTED, RolloutDecision, RolloutVerdict
from serve.state import Rollout, ServingState
from train.bundle import registry

logger = logging.getLogger(__name__)

# Number of latest decisions in the response of `/stats`.
MAX_DECISIONS = 50


@dataclass(frozen=True)
class StartRollout:
    """Load a candidate next to production and begin the first phase. location: of its bundle."""

    rollout: Rollout
    location: str


@dataclass(frozen=True)
class NextPhase:
    """Begin the next phase. reason: why the last phase has ended."""

    rollout: Rollout
    reason: str


@dataclass(frozen=True)
class PromoteCandidate:
    """End the rollout with the candidate in production."""

    candidate: str
    verdict: RolloutVerdict


@dataclass(frozen=True)
class RollBackCandidate:
    """End the rollout and keep the version in production."""

    candidate: str
    verdict: RolloutVerdict


RolloutStep = StartRollout | NextPhase | PromoteCandidate | RollBackCandidate


class RolloutController:
    """Determines the next step of a model's rollouts and records their end in the registry.

    The repository starts rollouts and their phases. Belongs to one event loop.
    """

    def __init__(
        self, config: ServeConfig, name: str, aggregator: MetricsAggregator, audit: AuditLog
    ) -> None:
        self._phases = config.phases
        self._name, self._aggregator, self._audit = name, aggregator, audit
        self._root = config.storage
        self._decisions: list[dict[str, Any]] = []

    async def load_decisions(self) -> None:
        """Read the decisions that were made before this server started."""
        if self._phases:
            found = await asyncio.to_thread(registry.list_decisions, self._root, self._name)
            self._decisions = found[-MAX_DECISIONS:]

    def stats(self, state: ServingState) -> dict[str, Any]:
        """Return the rollout in progress and the decisions, as in the response of `/stats`."""
        metrics = None
        if state.rollout is not None:
            metrics = self._aggregator.rollout_metrics(state.default, state.rollout)
        return {
            "rollout": None if metrics is None else {**metrics, "decision": None},
            "decisions": self._decisions,
        }

    async def next_step(self, state: ServingState) -> RolloutStep | None:
        """Return the step that is due now; None if there is none."""
        if not state.loaded or not self._phases:
            return None
        if state.rollout is None:
            return await self._candidate(state)
        verdict = self._aggregator.judge(state.default)
        if verdict is None:
            return None
        candidate = state.rollout.candidate
        names = [phase for phase, _ in self._phases]
        following = self._phases[names.index(state.rollout.phase) + 1 :]
        if verdict.decision != PROMOTED:
            return RollBackCandidate(candidate, verdict)
        if following:
            return NextPhase(Rollout(candidate, *following[0]), verdict.reason)
        return PromoteCandidate(candidate, verdict)

    async def _candidate(self, state: ServingState) -> StartRollout | None:
        found = await asyncio.to_thread(registry.pending_candidate, self._root, self._name)
        if found is None or found[1] == state.default:
            return None
        location, version = found
        return StartRollout(Rollout(version, *self._phases[0]), location)

    def decide(
        self, state: ServingState, candidate: str, verdict: RolloutVerdict
    ) -> RolloutDecision:
        """Return the decision about a candidate, with the current figures of the rollout."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        metrics = None
        if state.rollout is not None:
            metrics = self._aggregator.rollout_metrics(state.default, state.rollout)
        return RolloutDecision(
            now, candidate, state.default, verdict.decision, verdict.reason, metrics or {}
        )

    async def register(self, decision: RolloutDecision) -> None:
        """Move the registry's aliases as decided; may be repeated.

        Raises ProductionChanged if production is no longer the version that the candidate was
        compared with, RegistryError if the registry fails.
        """
        given = self._root, self._name, decision.version
        if decision.decision == PROMOTED:
            await asyncio.to_thread(
                registry.promote_candidate, *given, decision.production, decision.to_dict()
            )
        else:
            await asyncio.to_thread(registry.roll_back_candidate, *given, decision.to_dict())

    async def announce(self, decision: RolloutDecision) -> None:
        """Add a decision to the statistics and, unless it is there already, to the audit log."""
        words, version, reason = decision.decision, decision.version, decision.reason
        details = {"version": version, "decided": decision.time}
        if not await self._audit.contains(words, **details):
            await self._audit.add(words, ROLLOUT, "done", **details, reason=reason)
            logger.warning("candidate %s of %s is %s: %s", version, self._name, words, reason)
        others = [each for each in self._decisions if each["version"] != version]
        self._decisions = [*others, decision.to_dict()][-MAX_DECISIONS:]
