"""The desired state: the serving state that a model's replicas should have, stored crash-safely.

It is stored in documents under the storage path, `serving/<model>/<incarnation>/<number>.json`.
A document is created once and never changed, so if two processes try to write the next one, only
one succeeds.
"""

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from cluster import commit, storage
from serve.rollout.verdict import RolloutDecision
from serve.state import Rollout, ServingState

FOLDER = "serving"
# Documents that are kept; older ones are deleted.
KEEP = 10


class Transition(StrEnum):
    """The steps of the control plane, in order. It may crash or fail after each of them."""

    DECIDED = "a decision about a candidate is stored"
    REGISTERED = "the registry's aliases are set as decided"
    AUDITED = "the decision is in the audit log"
    RESOLVED = "the registry's aliases are resolved to versions"
    CHECKED = "new versions have passed their self-tests"
    WRITTEN = "a new state is stored"
    INSTALLED = "the replicas serve the new state"


class Conflict(Exception):
    """Another process of this deployment has changed the desired state."""


@dataclass(frozen=True)
class DesiredState:
    """The serving state that replicas should have, and unfinished work.

    number: of the document. before: the state that is served until all replicas have installed
    `state`. decision: a decision about a candidate that is not carried out yet.
    """

    number: int
    state: ServingState
    before: ServingState | None = None
    decision: RolloutDecision | None = None

    def to_json(self) -> bytes:
        """Return the content of the state's document."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "DesiredState":
        """Read the content of a document."""
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
        """Set the folder. state: the deployed state, which is current until the first change."""
        self._deployed = state
        self._folder = storage.join_path(root, FOLDER, state.name, state.incarnation)

    def read(self) -> DesiredState:
        """Return the latest desired state. Raises OSError if it cannot be read."""
        for number in reversed(self._numbers()):
            content = storage.read_file(self._url(number))
            if content is not None:  # otherwise another process deleted it as outdated
                return DesiredState.from_json(content)
        return DesiredState(0, self._deployed)

    def write(self, desired: DesiredState) -> DesiredState:
        """Write the document after number `desired.number`; return its content with its number.

        Raises Conflict if another process has already written that document, OSError if the
        document cannot be written.
        """
        following = replace(desired, number=desired.number + 1)
        url = self._url(following.number)
        created = commit.create_file(url, following.to_json())
        if not created and storage.read_file(url) != following.to_json():
            raise Conflict(f"document {following.number} of the desired state already exists.")
        # A process that was paused may create a document that others have written and deleted.
        numbers = self._numbers()
        if numbers[-1] > following.number:
            storage.remove(url)
            raise Conflict(f"the desired state is already at document {numbers[-1]}.")
        for number in numbers[:-KEEP]:
            storage.remove(self._url(number))
        return following

    def _numbers(self) -> list[int]:
        names = (name.removesuffix(".json") for name in storage.list_names(self._folder))
        return sorted(int(name) for name in names if name.isdecimal())

    def _url(self, number: int) -> str:
        return storage.join_path(self._folder, f"{number:08d}.json")
