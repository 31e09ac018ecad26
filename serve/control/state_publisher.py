"""Publishes the serving state to the replicas of a model, and tracks which of them follow it."""

import asyncio
import time
from dataclasses import dataclass, replace

from serve.errors import BadRequest
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

    revision: of the state that it was given. problem: why it could not install that state and
    serves the one before. at: time of the call by the monotonic clock.
    """

    revision: int
    problem: str | None
    metrics: Snapshot
    at: float


class StatePublisher:
    """Owns the serving state. Belongs to one event loop.

    current: the state that replicas follow. changing: held while the state is changed.
    """

    def __init__(self, state: ServingState) -> None:
        self.current = state
        self.changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._replicas: dict[str, ReplicaStatus] = {}

    async def follow(
        self,
        replica: str,
        serves: ServingState,
        revision: int,
        problem: str | None,
        metrics: Snapshot,
    ) -> ServingState | None:
        """Return the state once it is another than `revision`, or None after POLL_S.

        serves: the state that the replica serves. problem: why that is not the state of `revision`.
        """
        self._replicas[replica] = ReplicaStatus(revision, problem, metrics, time.monotonic())
        if revision > self.current.revision:
            # This process was restarted and has an older state than the replicas.
            self.current = replace(serves, revision=revision)
        if self.current.revision == revision:
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except TimeoutError:
                return None
        return self.current if self.current.revision != revision else None

    def keep_alive(self, replica: str) -> None:
        """Count a replica as living while it installs another state."""
        if replica in self._replicas:
            self._replicas[replica].at = time.monotonic()

    async def publish(self, state: ServingState) -> None:
        """Publish a state, and return once every living replica has installed it.

        Raises BadRequest, and the state before is published again, if one of them cannot.
        """
        before = self.current
        self._set(state)
        deadline = time.monotonic() + SWITCH_S
        while True:
            replicas = self.living().values()
            informed = [known for known in replicas if known.revision == state.revision]
            problem = next((known.problem for known in informed if known.problem), None)
            if problem is None and len(informed) == len(replicas):
                return
            if problem is None and time.monotonic() > deadline:
                problem = f"not every replica could go over within {SWITCH_S:g} s."
            if problem is not None:
                self._set(replace(before, revision=state.revision + 1))
                raise BadRequest(f"{problem} {UNCHANGED}")
            await asyncio.sleep(0.02)

    def living(self) -> dict[str, ReplicaStatus]:
        """Return the replicas that have called lately, by name."""
        now = time.monotonic()
        self._replicas = {
            name: known for name, known in self._replicas.items() if now - known.at < FORGET_S
        }
        return self._replicas

    def _set(self, state: ServingState) -> None:
        self.current = state
        self._changed.set()
        self._changed = asyncio.Event()
