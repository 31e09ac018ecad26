"""The registry: bundles as model versions in MLflow, with the aliases production and candidate.

Only drivers talk to it, never workers or replicas.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.errors import UserError
from train.bundle.bundle import Bundle

if TYPE_CHECKING:
    from mlflow import MlflowClient

PRODUCTION, CANDIDATE = "production", "candidate"
ARTIFACT = "bundle"
SCHEME = "models:/"
# What MLflow takes in one call.
BATCH_LIMIT = 1000
PARAM_LIMIT = 100


def summary(bundle: Bundle) -> dict[str, Any]:
    """Return what a training command prints of a bundle."""
    manifest = bundle.manifest
    return {
        "model": manifest.name,
        "version": None,
        "alias": None,
        "uri": None,
        "bundle": bundle.location,
        "metrics": manifest.metrics,
        "variants": {
            name: {
                "accepted": variant.accepted,
                **variant.metrics,
                "bytes": variant.size_bytes,
                "p50_ms": round(variant.p50_ms, 4),
                "records_per_s": round(variant.records_per_s, 1),
            }
            for name, variant in manifest.variants.items()
        },
        "default_variant": manifest.default_variant,
        "seconds": manifest.training_seconds,
    }


def publish(bundle: Bundle, root: str, metric: str) -> dict[str, Any]:
    """Log the bundle as an MLflow run and register it as a new version of its model.

    The version becomes production if it is no worse in `metric` than the one that is, else
    candidate; stderr says which and why. Returns {"version", "alias", "uri"}.
    """
    client = _client(root)
    manifest = bundle.manifest
    value = _metric(bundle, metric)
    run = client.create_run(_experiment(client, root, manifest.name), run_name=bundle.path.name)
    run_id = run.info.run_id
    _log(client, run_id, bundle)
    client.log_artifacts(run_id, str(bundle.path), ARTIFACT)
    client.set_terminated(run_id)

    current = production(client, manifest.name)
    if not client.search_registered_models(f"name = '{manifest.name}'"):
        client.create_registered_model(manifest.name)
    version = client.create_model_version(
        manifest.name,
        source=f"{run.info.artifact_uri}/{ARTIFACT}",
        run_id=run_id,
        tags={metric: repr(value)},
    ).version
    alias, reason = PRODUCTION, "no version is in production yet"
    if current is not None:
        before = current.tags.get(metric)
        reason = f"{metric} {value:.4f} against {before} of version {current.version}"
        if before is not None and value < float(before):
            alias = CANDIDATE
    client.set_registered_model_alias(manifest.name, alias, version)
    print(f"{manifest.name} version {version} is {alias}: {reason}", file=sys.stderr)
    uri = f"{SCHEME}{manifest.name}@{alias}"
    return {"version": int(version), "alias": alias, "uri": uri}


def resolve(uri: str, root: str) -> tuple[str, str]:
    """Return (location of the bundle, version) for models:/NAME/VERSION or models:/NAME@ALIAS.

    Anything else is taken as the location of a bundle itself. Raises UserError if the registry
    has no such version.
    """
    if not uri.startswith(SCHEME):
        return storage.resolve(uri), "1"
    from mlflow.exceptions import MlflowException

    name, alias, version = _parse(uri)
    client = _client(root)
    try:
        if alias:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, version)
    except MlflowException as error:
        known = client.search_model_versions(f"name = '{name}'")
        has = f"it has versions {', '.join(sorted(v.version for v in known))}" if known else ""
        raise UserError(
            f"'{uri}' is not in the registry at {_shown(root)}; "
            f"{has or 'no model of that name is'}. "
            "Train one with: python train/main.py"
        ) from error
    return _local(found.source), str(found.version)


def production(client: "MlflowClient", name: str) -> Any | None:
    """Return the model version in production, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, PRODUCTION)
    except MlflowException:
        return None


def _parse(uri: str) -> tuple[str, str, str]:
    """Split models:/NAME@ALIAS or models:/NAME/VERSION into name, alias, version."""
    rest = uri.removeprefix(SCHEME)
    name, _, alias = rest.partition("@")
    if alias and name:
        return name, alias, ""
    name, _, version = rest.partition("/")
    if name and version.isdecimal():
        return name, "", version
    raise UserError(f"'{uri}' names no model; expected models:/NAME@ALIAS or models:/NAME/VERSION.")


def _client(root: str) -> "MlflowClient":
    # A database that is new prints a page of migration steps.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    from mlflow import MlflowClient

    return MlflowClient(storage.tracking_uri(root))


def _experiment(client: "MlflowClient", root: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A tracking server chooses its own place; the embedded one would take the current directory.
    server = "MLFLOW_TRACKING_URI" in os.environ
    location = None if server else Path(root, "artifacts", name).as_uri()
    return client.create_experiment(name, artifact_location=location)


def _log(client: "MlflowClient", run_id: str, bundle: Bundle) -> None:
    """Log options, the curve of each metric by epoch, final metrics and pictures, in one call."""
    from mlflow.entities import Metric, Param

    manifest = bundle.manifest
    now_ms = int(time.time() * 1000)
    history = json.loads((bundle.path / "report/history.json").read_text())
    curve = [
        Metric(key, value, now_ms, int(row["epoch"]))
        for row in history
        for key, value in row.items()
    ]
    final = {
        **{f"final_{key}": value for key, value in manifest.metrics.items()},
        **{
            f"{name}/{key}": value
            for name, variant in manifest.variants.items()
            for key, value in (*variant.metrics.items(), ("p50_ms", variant.p50_ms))
        },
        "training_seconds": manifest.training_seconds,
    }
    curve += [Metric(key, value, now_ms, 0) for key, value in final.items()]
    params = [Param(key, str(value)[:500]) for key, value in _flat(manifest.config).items()]
    for start in range(0, len(curve), BATCH_LIMIT):
        client.log_batch(run_id, curve[start : start + BATCH_LIMIT])
    client.log_batch(run_id, params=params[:PARAM_LIMIT])
    client.log_artifacts(run_id, str(bundle.path / "report"), "report")


def _metric(bundle: Bundle, metric: str) -> float:
    metrics = bundle.manifest.variants[bundle.manifest.default_variant].metrics
    if metric not in metrics:
        raise UserError(f"registry.metric is '{metric}'; the model has {', '.join(metrics)}.")
    return metrics[metric]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _local(source: str) -> str:
    """A file: URI as a path; another URI as it is."""
    return source.removeprefix("file://") if source.startswith("file://") else source


def _shown(root: str) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", root)
