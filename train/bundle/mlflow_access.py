"""Access to MLflow: its client, its errors, and objects that only one process may create."""

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster import commit, storage
from cluster.errors import CommandFailed, disk_is_full

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

Found = TypeVar("Found")

# MLflow's environment variables, where the user has not set them.
SETTINGS = {
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    # The default retries take four minutes if a server responds with status 500.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # Progress bars and URLs would mix with the output of commands.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

LOCK_FILE = "mlflow.lock"


class RegistryError(CommandFailed):
    """The registry could not be read or changed, so its content is unknown."""


@contextmanager
def registry_errors(root: str) -> Iterator[None]:
    """Raise errors of MLflow in the block as a RegistryError of one line.

    Errors of a full disk are raised unchanged, because the user can remedy them.
    """
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
            "was decided, as its content is unknown; run the command again when it responds."
        ) from error


def already_exists(error: Exception) -> bool:
    """Return whether an error of MLflow means that the object exists already."""
    return getattr(error, "error_code", None) == "RESOURCE_ALREADY_EXISTS"


def mlflow_client(root: str) -> "MlflowClient":
    """Return a client of the registry; create the embedded one if it does not exist.

    Raises UserError if the storage path cannot have a registry.
    """
    # Creating a database would log a page of migration steps.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    uri = storage.tracking_uri(root)
    if not storage.has_registry(root):
        with lock_file(root):
            if not storage.has_registry(root):
                _make_database(root)
    return MlflowClient(uri)


def _make_database(root: str) -> None:
    """Create the embedded registry's database, complete or not at all.

    MLflow creates the tables in many steps. It cannot use a database in which one step failed, or
    on which two processes worked at once.
    """
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=commit.PART_PREFIX, dir=root) as folder:
        database = Path(folder, storage.REGISTRY)
        MlflowClient(f"sqlite:///{database}").search_experiments(max_results=1)
        commit.sync_tree(Path(folder))
        database.rename(Path(root, storage.REGISTRY))
        commit.sync_folder(Path(root))


@contextmanager
def lock_file(root: str) -> Iterator[None]:
    """Hold the lock of the embedded registry, which one process at a time can have."""
    with Path(root, LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_model(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """Return a registered model, with its versions by alias, or None if it does not exist."""
    return _unless_absent(lambda: client.get_registered_model(name))


def find_version(client: "MlflowClient", name: str, version: str) -> "ModelVersion | None":
    """Return a model version, or None if it does not exist."""
    return _unless_absent(lambda: client.get_model_version(name, version))


def _unless_absent(ask: Callable[[], Found]) -> Found | None:
    """Return the result of a request, or None if the object does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        # After any other error it is unknown whether the object exists.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def find_alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """Return the model version with an alias, or None if no version has it.

    Errors of MLflow are raised unchanged.
    """
    model = find_model(client, name)
    # A request for the alias itself would fail with one error code for a missing alias and for an
    # invalid name.
    version = model.aliases.get(alias) if model is not None else None
    return None if version is None else client.get_model_version(name, str(version))


def ensure_model(client: "MlflowClient", name: str) -> None:
    """Create a registered model unless it exists; several processes may call this at once."""
    from mlflow.exceptions import MlflowException

    if find_model(client, name) is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if not already_exists(error):
                raise


def ensure_experiment(client: "MlflowClient", root: str, name: str) -> str:
    """Return the id of an experiment; create it if it does not exist."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    # A tracking server chooses the location; the embedded one would use the current directory.
    location = None if has_server() else Path(root, "artifacts", name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        found = client.get_experiment_by_name(name) if already_exists(error) else None
        if found is None:
            raise
        return found.experiment_id


def has_server() -> bool:
    """Return whether the registry is an MLflow server rather than the embedded one."""
    return "MLFLOW_TRACKING_URI" in os.environ


def shown(root: str) -> str:
    """Return the address of the registry for messages: the server's URI or the storage path."""
    return os.environ.get("MLFLOW_TRACKING_URI", root)
