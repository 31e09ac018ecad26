"""The registry: bundles as model versions in MLflow, with the aliases production and candidate.

Only drivers use it, never workers or replicas.
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

# Tag of a version whose rollout has ended: the decision and its figures, as JSON.
DECISION = "decision"

ARTIFACT = "bundle"
TRAIN = "python train/main.py"

SCHEME = "models:/"


class ProductionChanged(Exception):
    """Another version became production while a candidate was being compared."""


def resolve_model(uri: str, root: str) -> tuple[str, str]:
    """Return (location of the bundle, version) for models:/NAME/VERSION or models:/NAME@ALIAS.

    Any other `uri` is the path or URL of a bundle, with version "1". Raises UserError if the
    registry has no such version, RegistryError if it cannot be read.
    """
    if not uri.startswith(SCHEME):
        return storage.resolve_path(uri), "1"
    name, alias, version = _parse(uri)
    if not storage.has_registry(root):
        raise UserError(
            f"'{uri}' cannot be found because there is no registry at '{root}'; "
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
    """Return (bundle, version) for a `uri` as in `resolve_model`.

    Raises UserError and RegistryError as `resolve_model` does; CorruptBundle if the bundle is
    damaged, names code that the operator has not allowed, or is registered under another model's
    name.
    """
    location, version = resolve_model(uri, root)
    bundle = Bundle.load(location)
    if uri.startswith(SCHEME) and bundle.manifest.name != model_name(uri):
        raise CorruptBundle(
            f"'{location}' is registered as '{model_name(uri)}' version {version}, but its "
            f"manifest has the name '{bundle.manifest.name}'. Register the right bundle."
        )
    return bundle, version


def load_model(model: str, storage_path: str = storage.DEFAULT_PATH) -> Bundle:
    """Return the bundle of a registered model, or the bundle at a location.

    model: models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URL of a bundle. storage_path:
    the storage path of the registry. Raises UserError if there is no such model, RegistryError if
    the registry does not respond, CorruptBundle for a bundle that cannot be used.
    """
    return load_bundle(model, storage.resolve_path(storage_path))[0]


def load_version(version: Any, root: str) -> Bundle:
    """Return the bundle of an MLflow model version. Raises CorruptBundle or UserError."""
    return Bundle.load(_local(version, root))


def model_name(uri: str) -> str:
    """Return the model's name in models:/NAME@ALIAS or models:/NAME/VERSION."""
    return _parse(uri)[0]


def name_in_production(reference: str) -> str:
    """Return the name in models:/NAME@production, or a name unchanged."""
    return reference.removeprefix(SCHEME).removesuffix(f"@{PRODUCTION}")


def alias_versions(root: str, name: str) -> dict[str, str]:
    """Return a model's versions by alias, empty for an unknown model. Raises RegistryError."""
    if not storage.has_registry(root):
        return {}
    with registry_errors(root):
        model = mlflow_access.find_model(mlflow_client(root), name)
    return {} if model is None else {alias: str(each) for alias, each in model.aliases.items()}


def pending_candidate(root: str, name: str) -> tuple[str, str] | None:
    """Return (location of the bundle, version) of the candidate, or None if it is decided.

    None also stands for a model without a candidate. Raises RegistryError.
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
    """Record the decision, make the candidate production, and the old production previous.

    production: the version that the candidate was compared with.

    It may be called again after a failure. Raises ProductionChanged if a third version is now in
    production, RegistryError if the registry fails.
    """
    with registry_errors(root):
        client = mlflow_client(root)
        with lock_registry(client, root) as lock:
            now = find_alias(client, name, PRODUCTION)
            if now is not None and str(now.version) not in (production, version):
                raise ProductionChanged(
                    f"version {now.version} is now in production; version {version} was "
                    f"compared with version {production}."
                )
            _record(client, lock, name, version, decision)
            set_production(client, lock, name, version)
            _end_candidacy(client, lock, name, version)


def roll_back_candidate(root: str, name: str, version: str, decision: dict[str, Any]) -> None:
    """Record the decision and remove the version's candidate alias; production is unchanged.

    It may be called again after a failure. Raises RegistryError.
    """
    with registry_errors(root):
        client = mlflow_client(root)
        with lock_registry(client, root) as lock:
            _record(client, lock, name, version, decision)
            _end_candidacy(client, lock, name, version)


def set_production(client: "MlflowClient", lock: RegistryLock, name: str, version: str) -> None:
    """Make a version production and the old one previous. It may be called again.

    Raises RegistryError if the lock may end too early.
    """
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
    """Return the decisions on a model's candidates, the oldest first. Raises RegistryError."""
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
    raise UserError(f"'{uri}' is not a model; expected models:/NAME@ALIAS or models:/NAME/VERSION.")


def _local(version: Any, root: str) -> str:
    """Return the local path of a version's bundle; artifacts of a server are downloaded."""
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
