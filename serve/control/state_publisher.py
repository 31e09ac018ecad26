"""Publishes the serving state to a model's replicas, and tracks which of them have installed it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from serve.control.desired_state import Conflict, DesiredState, DesiredStateStore, Transition
from serve.errors import BadRequest, Unavailable
from serve.rollout.verdict import RolloutDecision
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot

# Seconds that a replica's call waits for a change; then the replica calls again.
POLL_S = 4.0
# Seconds without a call after which a replica is considered dead.
FORGET_S = 20.0
# Most seconds until every live replica must serve a new state.
SWITCH_S = 300.0

UNCHANGED = "The previous versions are still served."


@dataclass
class ReplicaStatus:
    """The last call of a replica.

    known: id of the last state that the replica received. problem: why the replica could not
    install that state and still serves the previous one; None if it could. at: time of the call in
    seconds of the monotonic clock.
    """

    known: tuple[str, int]
    problem: str | None
    metrics: Snapshot
    at: float


class StatePublisher:
    """Owns the desired state and publishes it to the replicas. Belongs to one event loop.

    The state is never taken from replicas, because they may still serve another deployment's.
    changing: lock to hold while the state is changed.
    """

    def __init__(
        self, store: DesiredStateStore, reached: Callable[[Transition], None] = lambda each: None
    ) -> None:
        """Read the stored state. Raises OSError if the state from before a crash is unreadable."""
        self._store, self._reached = store, reached
        self._desired = store.read()
        # After a crash, replicas may not have installed the state, or may be unable to.
        self._unsettled = self._desired.before is not None
        self.changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._replicas: dict[str, ReplicaStatus] = {}

    @property
    def current(self) -> ServingState:
        """The state that replicas should serve."""
        return self._desired.state

    @property
    def decision(self) -> RolloutDecision | None:
        """A decision about a candidate that is not carried out yet; None if there is none."""
        return self._desired.decision

    async def follow(
        self, replica: str, known: tuple[str, int], problem: str | None, metrics: Snapshot
    ) -> ServingState | None:
        """Return the state once its id differs from `known`, or None after POLL_S seconds.

        problem: why the replica could not install the state `known`; None if it could.
        """
        self._replicas[replica] = ReplicaStatus(known, problem, metrics, time.monotonic())
        if self.current.id == known:
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except TimeoutError:
                return None
        return self.current if self.current.id != known else None

    def keep_alive(self, replica: str) -> None:
        """Keep a replica from being considered dead while it installs another state."""
        if replica in self._replicas:
            self._replicas[replica].at = time.monotonic()

    def leave(self, replica: str) -> None:
        """Remove a replica that is about to exit, so that no change waits for it."""
        self._replicas.pop(replica, None)

    async def decide(self, decision: RolloutDecision) -> None:
        """Store a decision, so that it is carried out even after a crash. Raises Unavailable."""
        await self._write(replace(self._desired, decision=decision))
        self._reached(Transition.DECIDED)

    async def publish(self, state: ServingState, *, decided: bool = False) -> None:
        """Publish a state, and return once every live replica has installed it.

        decided: whether this carries out the stored decision. Raises BadRequest if a replica cannot
        install the state; then the previous state is published again. Raises Unavailable if the
        state cannot be stored; then nothing has changed.
        """
        decision = None if decided else self.decision
        before = self.current
        state = replace(state, revision=before.revision + 1, incarnation=before.incarnation)
        if replace(state, revision=before.revision) == before:
            if self.decision != decision:
                await self._write(replace(self._desired, decision=decision))
            return
        await self._write(DesiredState(self._desired.number, state, before, decision))
        self._unsettled = True
        self._reached(Transition.WRITTEN)
        await self._settle()

    async def settle(self) -> None:
        """After a crash, wait until the replicas have installed the stored state, as `publish`."""
        if self._unsettled and self.living():
            await self._settle()

    async def _settle(self) -> None:
        """Wait until every live replica has installed the state; revert it if one cannot.

        Raises BadRequest if the state was reverted.
        """
        deadline = time.monotonic() + SWITCH_S
        while True:
            replicas = self.living().values()
            informed = [each for each in replicas if each.known == self.current.id]
            problem = next((each.problem for each in informed if each.problem), None)
            if problem is None and len(informed) == len(replicas):
                break
            if problem is None and time.monotonic() > deadline:
                problem = f"not every replica could install the state within {SWITCH_S:g} s."
            if problem is not None:
                await self._go_back()
                raise BadRequest(f"{problem} {UNCHANGED}")
            await asyncio.sleep(0.02)
        self._unsettled = False
        self._reached(Transition.INSTALLED)

    async def _go_back(self) -> None:
        before = self._desired.before
        assert before is not None, "a published state has a predecessor"
        state = replace(before, revision=self.current.revision + 1)
        await self._write(DesiredState(self._desired.number, state, decision=self.decision))
        self._unsettled = False

    def living(self) -> dict[str, ReplicaStatus]:
        """Return the live replicas by name: those that have called within FORGET_S seconds."""
        now = time.monotonic()
        self._replicas = {
            name: known for name, known in self._replicas.items() if now - known.at < FORGET_S
        }
        return self._replicas

    async def _write(self, desired: DesiredState) -> None:
        """Store the desired state, and send it to the replicas. Raises Unavailable."""
        try:
            written = await asyncio.to_thread(self._store.write, desired)
        except Conflict as error:
            self._set(await asyncio.to_thread(self._store.read))
            raise Unavailable(f"{error} Try again.", 2) from error
        except OSError as error:
            raise Unavailable(
                f"the serving state cannot be written ({error.strerror or error}). {UNCHANGED}", 10
            ) from error
        self._set(written)

    def _set(self, desired: DesiredState) -> None:
        self._desired = desired
        self._changed.set()
        self._changed = asyncio.Event()
