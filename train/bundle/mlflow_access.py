"""MLflow: the client, what its errors mean, and what one process at a time makes."""

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
        with lock_file(root):
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
def lock_file(root: str) -> Iterator[None]:
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
    location = None if has_server() else Path(root, "artifacts", name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        found = client.get_experiment_by_name(name) if already_exists(error) else None
        if found is None:
            raise
        return found.experiment_id


def has_server() -> bool:
    return "MLFLOW_TRACKING_URI" in os.environ


def shown(root: str) -> str:
    """Return how a message calls the registry."""
    return os.environ.get("MLFLOW_TRACKING_URI", root)
