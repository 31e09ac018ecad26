"""A lock that one process at a time holds while it changes a registry's aliases.

It is needed because MLflow has no compare-and-set for aliases.
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

# On a server, a lock is a registered model whose name is this prefix and a number.
LOCK_NAME = "halyard-lock-"
OWNER, RELEASED = "owner", "released"
# Seconds after which another process takes over a lock on a server whose holder it cannot check.
# The holder starts no change in the last WORK_S seconds; a change is a few requests.
LEASE_S = 600.0
WORK_S = 120.0
POLL_S = 0.2
TELL_S = 5.0


# Lets one thread of this process at a time wait for a server's lock: `_is_stale` regards a lock
# that this process holds as abandoned.
_own_turn = threading.Lock()


@dataclass(frozen=True)
class RegistryLock:
    """The right to change a registry's aliases. until: its end, in seconds of time.monotonic."""

    until: float

    def check(self) -> None:
        """Check before each change that there is time for it. Raises RegistryError if not.

        Otherwise two processes could change a very slow server at once.
        """
        if time.monotonic() > self.until:
            raise RegistryError(
                "the registry responds too slowly to change it safely; run the command again later."
            )


@contextmanager
def lock_registry(client: "MlflowClient", root: str) -> Iterator[RegistryLock]:
    """Wait for the lock of a registry and hold it during the block.

    The lock of the embedded registry is a file lock, which ends with the process. MLflow servers
    have no locks, but a name on them can be created only once: see `_lock_at_server`. Errors of
    MLflow are raised unchanged.
    """
    if has_server():
        with _own_turn, _lock_at_server(client) as lock:
            yield lock
        return
    with lock_file(root):
        yield RegistryLock(float("inf"))


@contextmanager
def _lock_at_server(client: "MlflowClient") -> Iterator[RegistryLock]:
    """Hold the lock of a server: the unreleased registered model with the highest number.

    Numbers only increase, and the highest is never deleted. So a process that creates a number too
    late, after others have created higher ones, sees that it does not have the lock.
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
                        "waiting for another registration; if its command was killed on another "
                        f"host, this one continues after {LEASE_S / 60:.0f} minutes",
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
    """Return whether a lock's holder has ended, or is this process, which failed to release it."""
    try:
        _, pid, started, boot, machine, host = owner.split("/", 5)
        process = ProcessIdentity(host, int(pid), machine, boot, int(started))
    except ValueError:
        return False
    return process == ProcessIdentity.current() or process.has_ended()


def _highest(client: "MlflowClient") -> tuple[int, str | None]:
    """Return the highest lock number, 0 if there is none, and its holder, None if released."""
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
    """Create a lock. Return whether this process created it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            f"{LOCK_NAME}{number}",
            tags={OWNER: owner},
            description="A lock that is held while an alias of a model changes; not a model.",
        )
    except MlflowException as error:
        if not already_exists(error):
            raise
        # The client repeats a request whose response was lost, so the first one may have succeeded.
        return _highest(client) == (number, owner)
    return True


def _release(client: "MlflowClient", number: int) -> None:
    """Release a lock and delete older ones. If a request fails, the lease ends the lock."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):
        client.set_registered_model_tag(f"{LOCK_NAME}{number}", RELEASED, "yes")
        for other in _locks(client):
            if other < number:
                client.delete_registered_model(f"{LOCK_NAME}{other}")
