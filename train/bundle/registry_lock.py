"""A lock that one process at a time holds while it changes a registry's aliases.

MLflow cannot compare and set an alias.
"""

import random
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.nodes.process_identity import ProcessIdentity
from train.bundle.mlflow_access import RegistryError, already_exists, has_server, lock_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

# A lock at a server is a registered model of this name and a number.
LOCK_NAME = "halyard-lock-"
OWNER, RELEASED = "owner", "released"
# A lock at a server whose holder cannot be asked is taken over after this time. What is done under
# it is a few requests; the last of them begins early enough to end before.
LEASE_S = 600.0
WORK_S = 120.0
POLL_S = 0.2
TELL_S = 5.0


# The threads of this process: of two that wait for a server's lock, one would take the other's.
_own_turn = threading.Lock()


@dataclass(frozen=True)
class RegistryLock:
    """The right to change a registry's aliases. until: when it ends, by the monotonic clock."""

    until: float

    def check(self) -> None:
        """Call before each change. Raises RegistryError where the lock may end before it is done.

        A server that answers very slowly could otherwise be changed by two at once.
        """
        if time.monotonic() > self.until:
            raise RegistryError(
                "the registry answers too slowly to change it safely; run the command again later."
            )


@contextmanager
def lock_registry(client: "MlflowClient", root: str) -> Iterator[RegistryLock]:
    """Hold the one lock of a registry, waiting for it if need be. Raises what MLflow raises.

    The embedded registry has a file that is locked, which ends with the process. MLflow servers
    have no such thing, but names that can be created only once: see `_lock_at_server`.
    """
    if has_server():
        with _own_turn, _lock_at_server(client) as lock:
            yield lock
        return
    with lock_file(root):
        yield RegistryLock(float("inf"))


@contextmanager
def _lock_at_server(client: "MlflowClient") -> Iterator[RegistryLock]:
    """Hold the lock of a server: the registered model with the highest number, not released.

    Numbers only grow and the highest is never deleted, so a number that was created late, after
    others have gone on, is not the highest, and is no lock.
    """
    seen, since = None, time.monotonic()
    owner, silent = _new_owner(), True
    while True:
        number, holder = _highest(client)
        if holder is not None:
            if holder != seen:
                seen, since = holder, time.monotonic()
            waited_s = time.monotonic() - since
            if waited_s < LEASE_S and not _is_stale(holder):
                if silent and waited_s > TELL_S:
                    silent = False
                    print(
                        "waiting for another registration; if its command has died on another "
                        f"host, this one goes on after {LEASE_S / 60:.0f} minutes",
                        file=sys.stderr,
                    )
                time.sleep(POLL_S * random.uniform(0.5, 1))
                continue
        begun = time.monotonic()
        if _create(client, number + 1, owner) and _highest(client) == (number + 1, owner):
            break
        owner = _new_owner()
    try:
        yield RegistryLock(begun + LEASE_S - WORK_S)
    finally:
        _release(client, number + 1)


def _new_owner() -> str:
    process = ProcessIdentity.current()
    words = (secrets.token_hex(8), process.pid, process.started, process.boot, process.machine)
    return "/".join([*map(str, words), process.host])


def _is_stale(owner: str) -> bool:
    """Whether a lock's holder has ended, or is this process, which could not give it back."""
    try:
        _, pid, started, boot, machine, host = owner.split("/", 5)
        process = ProcessIdentity(host, int(pid), machine, boot, int(started))
    except ValueError:
        return False
    return process == ProcessIdentity.current() or process.has_ended()


def _highest(client: "MlflowClient") -> tuple[int, str | None]:
    """Return the highest number of a lock, 0 if there is none, and who holds it."""
    found = _locks(client)
    if not found:
        return 0, None
    number = max(found)
    tags = found[number].tags
    return number, None if RELEASED in tags else tags.get(OWNER, "")


def _locks(client: "MlflowClient") -> "dict[int, RegisteredModel]":
    models = client.search_registered_models(f"name LIKE '{LOCK_NAME}%'", max_results=1000)
    numbers = ((model.name.removeprefix(LOCK_NAME), model) for model in models)
    return {int(number): model for number, model in numbers if number.isdecimal()}


def _create(client: "MlflowClient", number: int, owner: str) -> bool:
    """Create a lock; return whether this process did."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            f"{LOCK_NAME}{number}",
            tags={OWNER: owner},
            description="Held for a moment while the alias of a model changes; not a model.",
        )
    except MlflowException as error:
        if not already_exists(error):
            raise
        # The client repeats a request whose response it did not get.
        return _highest(client) == (number, owner)
    return True


def _release(client: "MlflowClient", number: int) -> None:
    """Give a lock back, and delete those before it; what fails here ends with the lease."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):
        client.set_registered_model_tag(f"{LOCK_NAME}{number}", RELEASED, "yes")
        for other in _locks(client):
            if other < number:
                client.delete_registered_model(f"{LOCK_NAME}{other}")
