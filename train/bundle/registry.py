"""The registry: bundles as model versions in MLflow, with the aliases production and candidate.

Only drivers talk to it, never workers or replicas.
"""

import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from cluster import commit, private, storage
from cluster.errors import UserError
from train.bundle.bundle import Bundle, CorruptBundle

if TYPE_CHECKING:
    from mlflow import MlflowClient


PRODUCTION, CANDIDATE, PREVIOUS = "production", "candidate", "previous"

# Tag of a version whose rollout has ended: what was decided, and its figures, as JSON.
DECISION = "decision"

ARTIFACT = "bundle"
TRAIN = "python train/main.py"

SCHEME = "models:/"


def resolve_model(uri: str, root: str) -> tuple[str, str]:
    """Return (location of the bundle, version) for models:/NAME/VERSION or models:/NAME@ALIAS.

    Anything else is taken as the location of a bundle itself. Raises UserError if the registry
    has no such version.
    """
    if not uri.startswith(SCHEME):
        return storage.resolve_path(uri), "1"
    from mlflow.exceptions import MlflowException

    name, alias, version = _parse(uri)
    if not storage.has_registry(root):
        raise UserError(
            f"'{uri}' cannot be found, as there is no registry at '{root}'; "
            f"train a model with: {TRAIN}"
        )
    try:
        client = mlflow_client(root)
        if alias:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, version)
        return _local(found, root), str(found.version)
    except MlflowException as error:
        raise UserError(
            f"'{uri}' is not in the registry at {_shown(root)} "
            f"({' '.join(str(error).split())[:200]}). Train one with: {TRAIN}"
        ) from error


def load_bundle(uri: str, root: str) -> tuple[Bundle, str]:
    """Return (bundle, version) for what `resolve` takes.

    Raises UserError as it does, CorruptBundle for a bundle that is damaged, that names code which
    the operator has not allowed, or that is of another model than the one it is registered as.
    """
    location, version = resolve_model(uri, root)
    bundle = Bundle.load(location)
    if uri.startswith(SCHEME) and bundle.manifest.name != model_name(uri):
        raise CorruptBundle(
            f"'{location}' is registered as '{model_name(uri)}' version {version}, but its "
            f"manifest says '{bundle.manifest.name}'. Register the bundle that belongs there."
        )
    return bundle, version


def model_name(uri: str) -> str:
    """Return the model's name in models:/NAME@ALIAS or models:/NAME/VERSION."""
    return _parse(uri)[0]


def production_version(client: "MlflowClient", name: str) -> Any | None:
    """Return the model version in production, or None."""
    return _by_alias(client, name, PRODUCTION)


def pending_candidate(root: str, name: str) -> tuple[str, str] | None:
    """Return (location of the bundle, version) of a candidate that nothing was decided of yet."""
    client = mlflow_client(root)
    found = _by_alias(client, name, CANDIDATE)
    if found is None or DECISION in found.tags:
        return None
    return _local(found, root), str(found.version)


def promote_candidate(root: str, name: str, version: str, decision: dict[str, Any]) -> None:
    """Record the decision and make the candidate production, and what was production previous."""
    client = mlflow_client(root)
    client.set_model_version_tag(name, version, DECISION, json.dumps(decision))
    before = production_version(client, name)
    if before is not None:
        client.set_registered_model_alias(name, PREVIOUS, before.version)
    client.set_registered_model_alias(name, PRODUCTION, version)
    _end_candidacy(client, name, version)


def roll_back_candidate(root: str, name: str, version: str, decision: dict[str, Any]) -> None:
    """Record the decision; production stays, and the version is no candidate any more."""
    client = mlflow_client(root)
    client.set_model_version_tag(name, version, DECISION, json.dumps(decision))
    _end_candidacy(client, name, version)


def _end_candidacy(client: "MlflowClient", name: str, version: str) -> None:
    found = _by_alias(client, name, CANDIDATE)
    if found is not None and str(found.version) == version:
        client.delete_registered_model_alias(name, CANDIDATE)


def list_decisions(root: str, name: str) -> list[dict[str, Any]]:
    """What was decided of candidates, the oldest first."""
    versions = mlflow_client(root).search_model_versions(f"name = '{name}'")
    found = [version.tags[DECISION] for version in versions if DECISION in version.tags]
    decided: list[dict[str, Any]] = [json.loads(decision) for decision in found]
    return sorted(decided, key=lambda decision: str(decision["time"]))


def _by_alias(client: "MlflowClient", name: str, alias: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException:
        return None


def _parse(uri: str) -> tuple[str, str, str]:
    """Split models:/NAME@ALIAS or models:/NAME/VERSION into name, alias, version."""
    rest = uri.removeprefix(SCHEME)
    name, _, alias = rest.partition("@")
    if alias and name:
        return storage.check_name(name, storage.MODEL_NAME, f"the model of '{uri}'"), alias, ""
    name, _, version = rest.partition("/")
    if name and version.isdecimal():
        return storage.check_name(name, storage.MODEL_NAME, f"the model of '{uri}'"), "", version
    raise UserError(f"'{uri}' names no model; expected models:/NAME@ALIAS or models:/NAME/VERSION.")


def mlflow_client(root: str) -> "MlflowClient":
    # A database that is new prints a page of migration steps.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    from mlflow import MlflowClient

    return MlflowClient(storage.tracking_uri(root))


def _local(version: Any, root: str) -> str:
    """The place of a version's bundle: a path, or a copy of what an MLflow server keeps."""
    source = urlparse(version.source)
    if source.scheme in ("", "file"):
        return url2pathname(source.path)
    from mlflow.artifacts import download_artifacts

    tracking_uri = storage.tracking_uri(root)
    key = json.dumps([tracking_uri, version.name, version.version, version.source])
    target = private.private_folder("downloads") / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not commit.is_whole(target):
        with commit.atomic_folder(str(target)) as aside:
            download_artifacts(
                artifact_uri=version.source, dst_path=str(aside), tracking_uri=tracking_uri
            )
    return str(target / ARTIFACT)


def is_registered(client: "MlflowClient", name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        return False
    return True


def _shown(root: str) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", root)
