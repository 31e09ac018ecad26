"""Publishes the serving state to the replicas of a model, and tracks which of them follow it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from serve.control.desired_state import Conflict, DesiredState, DesiredStateStore, Transition
from serve.errors import BadRequest, Unavailable
from serve.rollout.verdict import RolloutDecision
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot

# How long a replica waits for a change before it asks again.
POLL_S = 4.0
# A replica that has not called for this long counts as dead.
FORGET_S = 20.0
# How long a change may take until every living replica serves the new state.
SWITCH_S = 300.0

UNCHANGED = "What was served before still is."


@dataclass
class ReplicaStatus:
    """The last call of a replica.

    known: id of the state that it was given. problem: why it could not install that state and
    serves the one before. at: time of the call by the monotonic clock.
    """

    known: tuple[str, int]
    problem: str | None
    metrics: Snapshot
    at: float


class StatePublisher:
    """Owns the desired state, and has the replicas follow it. Belongs to one event loop.

    Replicas teach it nothing: what they serve may be of another deployment. changing: held while
    the state is changed.
    """

    def __init__(
        self, store: DesiredStateStore, reached: Callable[[Transition], None] = lambda each: None
    ) -> None:
        """Raises OSError where the state before a crash cannot be read."""
        self._store, self._reached = store, reached
        self._desired = store.read()
        # Before a crash, replicas may not have installed the state yet, or may not be able to.
        self._unsettled = self._desired.before is not None
        self.changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._replicas: dict[str, ReplicaStatus] = {}

    @property
    def current(self) -> ServingState:
        """The state that replicas follow."""
        return self._desired.state

    @property
    def decision(self) -> RolloutDecision | None:
        """What was decided of a candidate and is not carried out yet."""
        return self._desired.decision

    async def follow(
        self, replica: str, known: tuple[str, int], problem: str | None, metrics: Snapshot
    ) -> ServingState | None:
        """Return the state once its id is another than `known`, or None after POLL_S.

        problem: why the replica does not serve the state that it knows.
        """
        self._replicas[replica] = ReplicaStatus(known, problem, metrics, time.monotonic())
        if self.current.id == known:
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except TimeoutError:
                return None
        return self.current if self.current.id != known else None

    def keep_alive(self, replica: str) -> None:
        """Count a replica as living while it installs another state."""
        if replica in self._replicas:
            self._replicas[replica].at = time.monotonic()

    def leave(self, replica: str) -> None:
        """Forget a replica that ends, before it would be missed."""
        self._replicas.pop(replica, None)

    async def decide(self, decision: RolloutDecision) -> None:
        """Write down what is to be carried out, whatever happens. Raises Unavailable."""
        await self._write(replace(self._desired, decision=decision))
        self._reached(Transition.DECIDED)

    async def publish(self, state: ServingState, *, decided: bool = False) -> None:
        """Publish a state, and return once every living replica has installed it.

        decided: whether a decision that was written down is carried out by that. Raises BadRequest,
        and the state before is published again, if a replica cannot install it; Unavailable, and
        nothing has changed, if it cannot be written down.
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
        """After a crash, see to it that the replicas can install the state that was written."""
        if self._unsettled and self.living():
            await self._settle()

    async def _settle(self) -> None:
        """Wait until every living replica has installed the state; go back if one cannot."""
        deadline = time.monotonic() + SWITCH_S
        while True:
            replicas = self.living().values()
            informed = [each for each in replicas if each.known == self.current.id]
            problem = next((each.problem for each in informed if each.problem), None)
            if problem is None and len(informed) == len(replicas):
                break
            if problem is None and time.monotonic() > deadline:
                problem = f"not every replica could go over within {SWITCH_S:g} s."
            if problem is not None:
                await self._go_back()
                raise BadRequest(f"{problem} {UNCHANGED}")
            await asyncio.sleep(0.02)
        self._unsettled = False
        self._reached(Transition.INSTALLED)

    async def _go_back(self) -> None:
        before = self._desired.before
        assert before is not None, "a state that was published followed on another"
        state = replace(before, revision=self.current.revision + 1)
        await self._write(DesiredState(self._desired.number, state, decision=self.decision))
        self._unsettled = False

    def living(self) -> dict[str, ReplicaStatus]:
        """Return the replicas that have called lately, by name."""
        now = time.monotonic()
        self._replicas = {
            name: known for name, known in self._replicas.items() if now - known.at < FORGET_S
        }
        return self._replicas

    async def _write(self, desired: DesiredState) -> None:
        """Write the desired state down, and tell the replicas. Raises Unavailable."""
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
