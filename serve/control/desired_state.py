"""The desired state: what a model's replicas are to serve, kept so that a crash loses none of it.

Documents under the storage path, `serving/<model>/<incarnation>/<number>.json`. Each is created
once and never changed, so of two processes that would write the next one, only one can.
"""

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from cluster import commit, storage
from serve.rollout.verdict import RolloutDecision
from serve.state import Rollout, ServingState

FOLDER = "serving"
KEEP = 10


class Transition(StrEnum):
    """What the control plane does one after the other; it may end or fail after each of them."""

    DECIDED = "a decision about a candidate is written down"
    REGISTERED = "the registry's aliases are as decided"
    AUDITED = "the decision is in the audit log"
    RESOLVED = "what the registry says is looked up"
    CHECKED = "new versions have passed their self-tests"
    WRITTEN = "another state is written down"
    INSTALLED = "the replicas serve it"


class Conflict(Exception):
    """Another process of this deployment has changed the desired state."""


@dataclass(frozen=True)
class DesiredState:
    """number: of its document. before: what is served until the replicas have `state`.

    decision: what was decided of a candidate and is not carried out yet.
    """

    number: int
    state: ServingState
    before: ServingState | None = None
    decision: RolloutDecision | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "DesiredState":
        values = json.loads(content)
        decision = values["decision"]
        return cls(
            values["number"],
            _state(values["state"]),
            None if values["before"] is None else _state(values["before"]),
            None if decision is None else RolloutDecision(**decision),
        )


def _state(values: dict[str, Any]) -> ServingState:
    rollout = values["rollout"]
    return ServingState(**{**values, "rollout": None if rollout is None else Rollout(**rollout)})


class DesiredStateStore:
    """Reads and writes the desired state of one deployment of a model."""

    def __init__(self, root: str, state: ServingState) -> None:
        """state: what was deployed; it holds until the first change."""
        self._deployed = state
        self._folder = storage.join_path(root, FOLDER, state.name, state.incarnation)

    def read(self) -> DesiredState:
        """Return the latest desired state. Raises OSError."""
        for number in reversed(self._numbers()):
            content = storage.read_file(self._url(number))
            if content is not None:  # else it was deleted meanwhile, as others came after it
                return DesiredState.from_json(content)
        return DesiredState(0, self._deployed)

    def write(self, desired: DesiredState) -> DesiredState:
        """Write what follows on document `desired.number`; return it with its own number.

        Raises Conflict where another process did so first, OSError.
        """
        following = replace(desired, number=desired.number + 1)
        url = self._url(following.number)
        created = commit.create_file(url, following.to_json())
        if not created and storage.read_file(url) != following.to_json():
            raise Conflict(f"document {following.number} of the desired state exists already.")
        # A process that stood still may create a number that others wrote and deleted since.
        numbers = self._numbers()
        if numbers[-1] > following.number:
            storage.remove(url)
            raise Conflict(f"the desired state is at document {numbers[-1]} by now.")
        for number in numbers[:-KEEP]:
            storage.remove(self._url(number))
        return following

    def _numbers(self) -> list[int]:
        names = (name.removesuffix(".json") for name in storage.list_names(self._folder))
        return sorted(int(name) for name in names if name.isdecimal())

    def _url(self, number: int) -> str:
        return storage.join_path(self._folder, f"{number:08d}.json")
