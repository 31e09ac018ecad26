"""The registry: bundles as model versions in MLflow, with the aliases production and candidate.

Only drivers talk to it, never workers or replicas.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from cluster import commit, private, storage
from cluster.errors import UserError
from train.bundle import mlflow_access
from train.bundle.bundle import Bundle, CorruptBundle
from train.bundle.mlflow_access import (
    find_alias,
    find_version,
    mlflow_client,
    registry_errors,
)
from train.bundle.registry_lock import RegistryLock, lock_registry

if TYPE_CHECKING:
    from mlflow import MlflowClient


PRODUCTION, CANDIDATE, PREVIOUS = "production", "candidate", "previous"

# Tag of a version whose rollout has ended: what was decided, and its figures, as JSON.
DECISION = "decision"

ARTIFACT = "bundle"
TRAIN = "python train/main.py"

SCHEME = "models:/"


class ProductionChanged(Exception):
    """Another version became production while a candidate was compared."""


def resolve_model(uri: str, root: str) -> tuple[str, str]:
    """Return (location of the bundle, version) for models:/NAME/VERSION or models:/NAME@ALIAS.

    Anything else is taken as the location of a bundle itself. Raises UserError if the registry
    has no such version, RegistryError if it cannot be asked.
    """
    if not uri.startswith(SCHEME):
        return storage.resolve_path(uri), "1"
    name, alias, version = _parse(uri)
    if not storage.has_registry(root):
        raise UserError(
            f"'{uri}' cannot be found, as there is no registry at '{root}'; "
            f"train a model with: {TRAIN}"
        )
    with registry_errors(root):
        client = mlflow_client(root)
        found = find_alias(client, name, alias) if alias else find_version(client, name, version)
        if found is not None:
            return _local(found, root), str(found.version)
    raise UserError(
        f"'{uri}' is not in the registry at {mlflow_access.shown(root)}. "
        f"Train a model with: {TRAIN}"
    )


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


def load_version(version: Any, root: str) -> Bundle:
    """Return the bundle of an MLflow model version. Raises CorruptBundle, UserError."""
    return Bundle.load(_local(version, root))


def model_name(uri: str) -> str:
    """Return the model's name in models:/NAME@ALIAS or models:/NAME/VERSION."""
    return _parse(uri)[0]


def alias_versions(root: str, name: str) -> dict[str, str]:
    """Return a model's versions by alias; none without the model. Raises RegistryError."""
    if not storage.has_registry(root):
        return {}
    with registry_errors(root):
        model = mlflow_access.find_model(mlflow_client(root), name)
    return {} if model is None else {alias: str(each) for alias, each in model.aliases.items()}


def pending_candidate(root: str, name: str) -> tuple[str, str] | None:
    """Return (location of the bundle, version) of a candidate that nothing was decided of yet.

    Raises RegistryError.
    """
    with registry_errors(root):
        client = mlflow_client(root)
        found = find_alias(client, name, CANDIDATE)
        if found is None or DECISION in found.tags:
            return None
        return _local(found, root), str(found.version)


def promote_candidate(
    root: str, name: str, version: str, production: str, decision: dict[str, Any]
) -> None:
    """Record the decision and make the candidate production, and what was production previous.

    production: the version that the candidate was compared with.

    May be repeated, as after a failure in the middle. Raises ProductionChanged where another
    version is production by now, RegistryError.
    """
    with registry_errors(root):
        client = mlflow_client(root)
        with lock_registry(client, root) as lock:
            now = find_alias(client, name, PRODUCTION)
            if now is not None and str(now.version) not in (production, version):
                raise ProductionChanged(
                    f"version {now.version} is in production by now; version {version} was "
                    f"compared with version {production}."
                )
            _record(client, lock, name, version, decision)
            set_production(client, lock, name, version)
            _end_candidacy(client, lock, name, version)


def roll_back_candidate(root: str, name: str, version: str, decision: dict[str, Any]) -> None:
    """Record the decision; production stays, and the version is no candidate any more.

    May be repeated. Raises RegistryError.
    """
    with registry_errors(root):
        client = mlflow_client(root)
        with lock_registry(client, root) as lock:
            _record(client, lock, name, version, decision)
            _end_candidacy(client, lock, name, version)


def set_production(client: "MlflowClient", lock: RegistryLock, name: str, version: str) -> None:
    """Make a version production, and what was production previous. May be repeated."""
    before = find_alias(client, name, PRODUCTION)
    if before is not None and str(before.version) != version:
        lock.check()
        client.set_registered_model_alias(name, PREVIOUS, str(before.version))
    lock.check()
    client.set_registered_model_alias(name, PRODUCTION, version)


def _record(
    client: "MlflowClient", lock: RegistryLock, name: str, version: str, decision: dict[str, Any]
) -> None:
    lock.check()
    client.set_model_version_tag(name, version, DECISION, json.dumps(decision))


def _end_candidacy(client: "MlflowClient", lock: RegistryLock, name: str, version: str) -> None:
    found = find_alias(client, name, CANDIDATE)
    if found is not None and str(found.version) == version:
        lock.check()
        client.delete_registered_model_alias(name, CANDIDATE)


def list_decisions(root: str, name: str) -> list[dict[str, Any]]:
    """What was decided of candidates, the oldest first. Raises RegistryError."""
    with registry_errors(root):
        versions = mlflow_client(root).search_model_versions(f"name = '{name}'")
    found = [version.tags[DECISION] for version in versions if DECISION in version.tags]
    decided: list[dict[str, Any]] = [json.loads(decision) for decision in found]
    return sorted(decided, key=lambda decision: str(decision["time"]))


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
