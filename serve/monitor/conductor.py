"""The conductor: runs rollouts, and takes feedback. A part of the repository.

It looks for a candidate in the registry, has the replicas load it and try it on some requests,
judges it by what they report, and writes what it decided, with the figures, to the registry.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

from cluster import storage
from cluster.errors import UserError
from serve.audit import ROLLOUT, AuditLog
from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound, Unavailable
from serve.monitor import logged, overseer
from serve.monitor.feedback import Feedback, Prediction
from serve.monitor.overseer import Overseer, Report
from serve.monitor.requestlog import FeedbackLog, Sample, options
from serve.monitor.rollout import PROMOTED, REFUSED, Decision, Verdict
from serve.served import State, Trial
from train.bundle import Bundle, CorruptBundle, registry

logger = logging.getLogger(__name__)

# How often the registry is asked for a candidate, and figures are judged.
TICK_S = 2.0
MAX_DECISIONS = 50
# How long feedback waits for a server that has just begun.
BEGIN_S = 15.0


class Repository(Protocol):
    """Where the state is kept that replicas follow."""

    current: State
    loading: asyncio.Lock

    def find_now(self) -> State:
        """What the registry has; may take a moment. Raises UserError."""
        ...

    def check_fit(self, locations: Sequence[str]) -> None: ...
    async def publish(self, state: State) -> None: ...
    async def hear(self) -> None:
        """Return once each replica that lives has reported anew."""
        ...


class Conductor:
    """Belongs to one event loop."""

    def __init__(
        self, repository: Repository, config: ServeConfig, name: str, audit: AuditLog
    ) -> None:
        self._repository, self._config, self._name = repository, config, name
        self._audit = audit
        self._root = storage.resolve(config.storage)
        self.overseer = Overseer(config, name)
        self._sample = Sample(config.log_share)
        self._truths: FeedbackLog | None = None
        if config.log_share:
            self._truths = FeedbackLog(self._root, name, options(config))
        self._decisions: list[dict[str, Any]] = []
        self._hearing: asyncio.Future[None] | None = None
        self._late = asyncio.Lock()
        self._watches = asyncio.Event()
        self._dirty = False
        # Why the state could not be written the last time.
        self._problem: str | None = None
        self._running: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start, if it has not; the first replica is there then."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Write what is left of the feedback."""
        if self._truths is not None:
            await self._truths.close()

    def report(self, report: Report) -> None:
        self._dirty |= self.overseer.report(report)

    def stats(self) -> dict[str, Any]:
        state = self._repository.current
        trial = state.trial
        told = None
        if trial is not None:
            told = self.overseer.figures(state.default, trial.phase, trial.share)
        return {
            "monitor": self.overseer.stats(),
            "rollout": None if told is None else {**told, "decision": None},
            "decisions": self._decisions,
        }

    async def feedback(self, request_id: str, truths: Sequence[Any]) -> dict[str, Any]:
        """Take the truth of a request's records. Raises NotFound, BadRequest, Unavailable."""
        if self._truths is None:
            raise BadRequest("feedback needs logged requests: serve with log_share=1, or less.")
        if not self._sample.has(request_id):
            return {"id": request_id, "counted": False, "reason": "this request is not sampled"}
        known = await self._watching()
        if not (known.knows(request_id) or await self._heard_of(request_id, len(truths))):
            raise NotFound(
                f"no request '{request_id[:100]}' is known; give the x-request-id of an answer."
            )
        changed = known.give(request_id, truths)
        for row, truth in enumerate(truths):
            self._truths.add(request_id, row, known.truth(truth))
        self._dirty = True
        return {"id": request_id, "counted": True, "changed": changed}

    async def _watching(self) -> Feedback:
        """Wait until the first version is watched. Raises Unavailable."""
        try:
            await asyncio.wait_for(self._watches.wait(), BEGIN_S)
        except TimeoutError:
            raise Unavailable("the model is not watched yet.", 5) from None
        assert self.overseer.feedback is not None
        return self.overseer.feedback

    async def _heard_of(self, request_id: str, count: int) -> bool:
        """Ask the replicas; then look into the log, for what came long ago."""
        known = await self._watching()
        # The first time may have begun before the request was answered.
        for _ in range(2):
            await self._hear()
            if known.knows(request_id):
                return True
        async with self._late:
            rows = await asyncio.to_thread(logged.find, self._root, self._name, request_id)
        if not rows:
            return False
        # Of a large request, some rows are logged.
        predictions: list[Prediction | None] = [None] * max(count, rows[-1].row + 1)
        for row in rows:
            predictions[row.row] = row.prediction
        known.predicted(request_id, rows[0].version, predictions)
        return True

    async def _hear(self) -> None:
        """Let the replicas report; all who want that at once wait for the same."""
        if self._hearing is None or self._hearing.done():
            self._hearing = asyncio.ensure_future(self._repository.hear())
        await asyncio.shield(self._hearing)

    async def _run(self) -> None:
        try:
            found = await asyncio.to_thread(self._decided_before)
            self._decisions = found[-MAX_DECISIONS:]
        except Exception:
            logger.exception("earlier decisions cannot be read")
        while True:
            try:
                await self._tick()
            except Exception:
                logger.exception("the monitor failed; it goes on")
            await asyncio.sleep(TICK_S)

    def _decided_before(self) -> list[dict[str, Any]]:
        return registry.decisions(self._root, self._name) if self._config.phases else []

    async def _tick(self) -> None:
        state = self._repository.current
        self.overseer.forget(state.locations)
        for version, location in state.locations.items():
            if not self.overseer.watches(version):
                found = await asyncio.to_thread(overseer.find, location, self._config)
                self.overseer.watch(version, *found)
                self._watches.set()
        if self._dirty:
            await self._keep(state.default)
        if not state.loaded or not self._config.phases:
            return
        if state.trial is None:
            found_ = await asyncio.to_thread(registry.candidate, self._root, self._name)
            if found_ is not None and found_[1] != state.default:
                await self._try(*found_)
            return
        verdict = self.overseer.judge(state.default)
        if verdict is not None:
            await self._follow(state.trial, verdict)

    async def _keep(self, production: str) -> None:
        """Write the state; again next time, where that fails. A rollout goes on without."""
        self._dirty = False
        kept = self.overseer.state(production)
        problem = None
        try:
            await asyncio.to_thread(overseer.keep, self._root, self._name, kept)
        except OSError as error:
            self._dirty, problem = True, str(error)
        if problem is not None and problem != self._problem:
            logger.error("the monitor's state cannot be written: %s", problem)
        self._problem = problem

    async def _try(self, location: str, version: str) -> None:
        """Have the replicas load a candidate; refuse one that does not fit."""
        async with self._repository.loading:
            try:
                await asyncio.to_thread(self._check, location)
                state = self._repository.current
                phase, share = self._config.phases[0]
                trial = Trial(version, phase, share)
                locations = {**state.locations, version: location}
                aliases = {**state.aliases, registry.CANDIDATE: version}
                revision = state.revision + 1
                # Before its first answer comes.
                self.overseer.begin(version)
                await self._repository.publish(
                    replace(
                        state,
                        revision=revision,
                        locations=locations,
                        aliases=aliases,
                        trial=trial,
                    )
                )
            except (UserError, CorruptBundle, ValueError, BadRequest) as error:
                self.overseer.end()
                await self._decide(version, Verdict(REFUSED, str(error)), {})
        logger.info("candidate %s: %s", version, self._repository.current.trial)

    def _check(self, location: str) -> None:
        """Raises CorruptBundle or ValueError for a candidate that cannot stand for production."""
        self._repository.check_fit([location])
        state = self._repository.current
        ours, its = (
            Bundle.load(each).manifest for each in (state.locations[state.default], location)
        )
        if (ours.inputs, ours.outputs) != (its.inputs, its.outputs):
            raise ValueError("its inputs or outputs differ from those of production.")

    async def _follow(self, trial: Trial, verdict: Verdict) -> None:
        """Do what the verdict says: go on to the next phase, promote or roll back."""
        phases = [phase for phase, _ in self._config.phases]
        following = self._config.phases[phases.index(trial.phase) + 1 :]
        async with self._repository.loading:
            state = self._repository.current
            if state.trial != trial:
                return  # it was loaded anew meanwhile
            if verdict.decision == PROMOTED and following:
                phase, share = following[0]
                logger.info("candidate %s goes on as %s: %s", trial.candidate, phase, verdict)
                self.overseer.begin(trial.candidate)
                later = replace(trial, phase=phase, share=share)
                await self._repository.publish(
                    replace(state, revision=state.revision + 1, trial=later)
                )
                return
            figures = self.overseer.figures(state.default, trial.phase, trial.share) or {}
            await self._decide(trial.candidate, verdict, figures)
            self.overseer.end()
            await self._repository.publish(await asyncio.to_thread(self._repository.find_now))

    async def _decide(self, version: str, verdict: Verdict, figures: dict[str, Any]) -> None:
        """Write a decision to the registry; only then it is one."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        decision = Decision(now, version, verdict.decision, verdict.reason, figures).to_dict()
        promote = verdict.decision == PROMOTED
        await asyncio.to_thread(
            lambda: registry.decide(self._root, self._name, version, decision, promote=promote)
        )
        await self._audit.add(
            verdict.decision, ROLLOUT, "done", version=version, reason=verdict.reason
        )
        logger.warning("candidate %s of %s is %s: %s", version, self._name, *vars(verdict).values())
        self._decisions = [*self._decisions, decision][-MAX_DECISIONS:]
