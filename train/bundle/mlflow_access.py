"""MLflow: the client, what its errors mean, and a lock that one process at a time holds."""

import fcntl
import logging
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster import commit, storage
from cluster.errors import CommandFailed, disk_is_full
from cluster.process_identity import ProcessIdentity

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

Found = TypeVar("Found")

# MLflow's settings where the user has none.
SETTINGS = {
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    # Its own wait four minutes for a server that answers 500.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # It would print between what a command prints.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

LOCK_FILE = "mlflow.lock"
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


class RegistryError(CommandFailed):
    """The registry could not be asked or changed; what it holds is not known."""


@contextmanager
def registry_errors(root: str) -> Iterator[None]:
    """Turn what MLflow raises into a RegistryError of one line."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        if disk_is_full(error):
            raise
        raise RegistryError(
            f"the registry at {shown(root)} failed: {' '.join(str(error).split())[:300]}. Nothing "
            "was decided by this; run the command again once it answers."
        ) from error


def already_exists(error: Exception) -> bool:
    return getattr(error, "error_code", None) == "RESOURCE_ALREADY_EXISTS"


def mlflow_client(root: str) -> "MlflowClient":
    """Return a client; the embedded registry is made if there is none. Raises UserError."""
    # A database that is new prints a page of migration steps.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    uri = storage.tracking_uri(root)
    if not storage.has_registry(root):
        with _lock_file(root):
            if not storage.has_registry(root):
                _make_database(root)
    return MlflowClient(uri)


def _make_database(root: str) -> None:
    """Make the embedded registry's database, complete or not at all.

    MLflow makes its tables in many steps, and cannot use what is left where one of them failed,
    or where two processes took them at once.
    """
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=commit.PART_PREFIX, dir=root) as folder:
        database = Path(folder, storage.REGISTRY)
        MlflowClient(f"sqlite:///{database}").search_experiments(max_results=1)
        commit.sync_tree(Path(folder))
        database.rename(Path(root, storage.REGISTRY))
        commit.sync_folder(Path(root))


@contextmanager
def _lock_file(root: str) -> Iterator[None]:
    with Path(root, LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_model(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """Return a registered model, with its versions by alias; None if there is none."""
    return _unless_absent(lambda: client.get_registered_model(name))


def find_version(client: "MlflowClient", name: str, version: str) -> "ModelVersion | None":
    return _unless_absent(lambda: client.get_model_version(name, version))


def _unless_absent(ask: Callable[[], Found]) -> Found | None:
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        # Anything else leaves open whether it is there.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def find_alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """Return the model version that has an alias; None if none has. Raises what MLflow raises."""
    model = find_model(client, name)
    # Asking for the alias itself, MLflow has one code for one that is missing and for a bad name.
    version = model.aliases.get(alias) if model is not None else None
    return None if version is None else client.get_model_version(name, str(version))


def ensure_model(client: "MlflowClient", name: str) -> None:
    """Register a model's name if it is not there; several processes may do so at once."""
    from mlflow.exceptions import MlflowException

    if find_model(client, name) is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if not already_exists(error):
                raise


def ensure_experiment(client: "MlflowClient", root: str, name: str) -> str:
    """Return the id of an experiment, created if it is not there."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    # A tracking server chooses its own place; the embedded one would take the current directory.
    location = None if _has_server() else Path(root, "artifacts", name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        found = client.get_experiment_by_name(name) if already_exists(error) else None
        if found is None:
            raise
        return found.experiment_id


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
    if _has_server():
        with _own_turn, _lock_at_server(client) as lock:
            yield lock
        return
    with _lock_file(root):
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


def _has_server() -> bool:
    return "MLFLOW_TRACKING_URI" in os.environ


def shown(root: str) -> str:
    """Return how a message calls the registry."""
    return os.environ.get("MLFLOW_TRACKING_URI", root)
