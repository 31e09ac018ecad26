"""The registry: bundles as model versions in MLflow, with the aliases production and candidate.

Only drivers talk to it, never workers or replicas.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from cluster import private, storage
from cluster.errors import UserError
from train.bundle.bundle import WEIGHTS, Bundle, CorruptBundle
from train.tasks.targets import LOWER_IS_BETTER

if TYPE_CHECKING:
    from mlflow import MlflowClient

PRODUCTION, CANDIDATE, PREVIOUS = "production", "candidate", "previous"
# Tag of a version whose rollout has ended: what was decided, and its figures, as JSON.
DECISION = "decision"
ARTIFACT = "bundle"
SCHEME = "models:/"
TRAIN = "python train/main.py"
# What MLflow takes in one call.
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
                "verdict": variant.verdict,
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


class Recording:
    """An MLflow run that is written while its training goes on.

    It begins with the first event, so that a run that is refused leaves nothing.
    name: of the experiment. tags: of the run. run_id: of a run that began before, to go on with.
    """

    def __init__(
        self,
        root: str,
        name: str,
        options: dict[str, Any],
        *,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        self._root, self._name, self._options = root, name, options
        self._tags = dict(tags or {})
        self._client: MlflowClient | None = None
        self.run_id = run_id

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._client is not None and self.run_id is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if kind is None else "FAILED")

    def observe(self, event: dict[str, Any]) -> None:
        """Log an event's figures, by step or by epoch."""
        from mlflow.entities import Metric

        client, run_id = self.begin()
        if event["event"] not in ("steps", "epoch"):
            return
        now_ms = int(time.time() * 1000)
        by_epoch = event["event"] == "epoch"
        at = int(event["epoch" if by_epoch else "step"])
        prefix = "" if by_epoch else "step/"
        figures = [
            Metric(prefix + key, float(value), now_ms, at)
            for key, value in event.items()
            if key not in ("event", "epoch", "step")
        ]
        client.log_batch(run_id, figures)

    def begin(self) -> tuple["MlflowClient", str]:
        """Return the client and the run, created with its options the first time."""
        from mlflow.entities import Param

        if self._client is None:
            self._client = _client(self._root)
        if self.run_id is None:
            experiment = _experiment(self._client, self._root, self._name)
            self.run_id = self._client.create_run(experiment, tags=self._tags).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flat(self._options).items()]
            self._client.log_batch(self.run_id, params=params[:PARAM_LIMIT])
        return self._client, self.run_id


def publish(
    bundle: Bundle,
    recording: Recording,
    root: str,
    metric: str | None,
    *,
    figure: float | None = None,
    candidate: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Add the bundle to its run and register it as a new version of its model.

    The version becomes production if it is no worse in `metric` (the task's own on the validation
    split when None) than the one that is, or is the same net with other variants, else candidate;
    stderr says which and why. Returns {"version", "alias", "uri"}.

    figure: what stands for the metric where the bundle's own is of records it was trained on.
    candidate: why the version becomes candidate and never production, whatever its figures.
    tags: of the version, besides its figures and its lineage.
    """
    client, run_id = recording.begin()
    manifest = bundle.manifest
    metric = metric or f"valid_{bundle.task.metric}"
    value = _metric(bundle, metric) if figure is None else figure
    client.update_run(run_id, name=bundle.path.name)
    _log(client, run_id, bundle)
    client.log_artifacts(run_id, str(bundle.path), ARTIFACT)
    run = client.get_run(run_id)

    current = production(client, manifest.name)
    if current is None and not _exists(client, manifest.name):
        client.create_registered_model(manifest.name)
    metrics = manifest.variants[manifest.default_variant].metrics | {metric: value}
    origin = {key: str(value) for key, value in manifest.lineage.items()}
    weights = manifest.files[WEIGHTS].sha256
    version = client.create_model_version(
        manifest.name,
        source=f"{run.info.artifact_uri}/{ARTIFACT}",
        run_id=run_id,
        tags={
            WEIGHTS: weights,
            **origin,
            **(tags or {}),
            **{key: repr(figure) for key, figure in metrics.items()},
        },
    ).version
    alias, reason = PRODUCTION, "no version is in production yet"
    if candidate is not None:
        alias, reason = CANDIDATE, candidate
    elif current is not None:
        before = float(current.tags.get(metric, math.nan))
        reason = f"{metric} {value:.4f} against {before:.4f} of version {current.version}"
        if current.tags.get(WEIGHTS) == weights:
            reason += ", which is the same net, compressed anew and accepted by the gate"
        elif _worse(metric, value, before):
            alias = CANDIDATE
    client.set_registered_model_alias(manifest.name, alias, version)
    print(f"{manifest.name} version {version} is {alias}: {reason}", file=sys.stderr)
    uri = f"{SCHEME}{manifest.name}@{alias}"
    return {"version": int(version), "alias": alias, "uri": uri}


def check(root: str, metric: str | None) -> None:
    """Raises UserError for what `publish` would refuse, before any work is done."""
    storage.tracking_uri(root)
    if metric is not None and not metric.startswith("valid_"):
        raise UserError(
            f"registry.metric is '{metric}'; accepted are metrics of the validation split, such as "
            "valid_accuracy, as no choice sees the test split."
        )


def resolve(uri: str, root: str) -> tuple[str, str]:
    """Return (location of the bundle, version) for models:/NAME/VERSION or models:/NAME@ALIAS.

    Anything else is taken as the location of a bundle itself. Raises UserError if the registry
    has no such version.
    """
    if not uri.startswith(SCHEME):
        return storage.resolve(uri), "1"
    from mlflow.exceptions import MlflowException

    name, alias, version = _parse(uri)
    if not storage.has_registry(root):
        raise UserError(
            f"'{uri}' cannot be found, as there is no registry at '{root}'; "
            f"train a model with: {TRAIN}"
        )
    try:
        client = _client(root)
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


def load(uri: str, root: str) -> tuple[Bundle, str]:
    """Return (bundle, version) for what `resolve` takes.

    Raises UserError as it does, CorruptBundle for a bundle that is damaged, that names code which
    the operator has not allowed, or that is of another model than the one it is registered as.
    """
    location, version = resolve(uri, root)
    bundle = Bundle.load(location)
    if uri.startswith(SCHEME) and bundle.manifest.name != name_of(uri):
        raise CorruptBundle(
            f"'{location}' is registered as '{name_of(uri)}' version {version}, and says that it "
            f"is '{bundle.manifest.name}'. Register the bundle that belongs there."
        )
    return bundle, version


def name_of(uri: str) -> str:
    """Return the model's name in models:/NAME@ALIAS or models:/NAME/VERSION."""
    return _parse(uri)[0]


def production(client: "MlflowClient", name: str) -> Any | None:
    """Return the model version in production, or None."""
    return _by_alias(client, name, PRODUCTION)


def candidate(root: str, name: str) -> tuple[str, str] | None:
    """Return (location of the bundle, version) of a candidate that nothing was decided of yet."""
    client = _client(root)
    found = _by_alias(client, name, CANDIDATE)
    if found is None or DECISION in found.tags:
        return None
    return _local(found, root), str(found.version)


def decide(root: str, name: str, version: str, decision: dict[str, Any], *, promote: bool) -> None:
    """Write what was decided of a candidate, and move the aliases.

    promote: it becomes production, and what was is the previous one. It is no candidate after this.
    """
    client = _client(root)
    client.set_model_version_tag(name, version, DECISION, json.dumps(decision))
    if promote:
        before = production(client, name)
        if before is not None:
            client.set_registered_model_alias(name, PREVIOUS, before.version)
        client.set_registered_model_alias(name, PRODUCTION, version)
    found = _by_alias(client, name, CANDIDATE)
    if found is not None and str(found.version) == version:
        client.delete_registered_model_alias(name, CANDIDATE)


def decisions(root: str, name: str) -> list[dict[str, Any]]:
    """What was decided of candidates, the oldest first."""
    versions = _client(root).search_model_versions(f"name = '{name}'")
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
    """Log the final figures of the net and of each variant, and the pictures."""
    from mlflow.entities import Metric

    manifest = bundle.manifest
    now_ms = int(time.time() * 1000)
    final = {
        **{f"final_{key}": value for key, value in manifest.metrics.items()},
        **{
            f"{name}/{key}": value
            for name, variant in manifest.variants.items()
            for key, value in (*variant.metrics.items(), ("p50_ms", variant.p50_ms))
        },
        "training_seconds": manifest.training_seconds,
    }
    client.log_batch(run_id, [Metric(key, value, now_ms, 0) for key, value in final.items()])
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


def _local(version: Any, root: str) -> str:
    """The place of a version's bundle: a path, or a copy of what an MLflow server keeps."""
    source = urlparse(version.source)
    if source.scheme in ("", "file"):
        return url2pathname(source.path)
    from mlflow.artifacts import download_artifacts

    cache = private.folder("downloads") if storage.is_url(root) else Path(root) / "downloads"
    storage.check_name(version.run_id, storage.FILE_NAME, "the run of a registered model")
    target = cache / version.run_id
    if not (target / ARTIFACT).exists():
        aside = cache / f"{version.run_id}.{os.getpid()}.part"
        aside.mkdir(parents=True)
        download_artifacts(
            artifact_uri=version.source,
            dst_path=str(aside),
            tracking_uri=storage.tracking_uri(root),
        )
        try:
            aside.rename(target)
        except OSError:  # another process was quicker
            shutil.rmtree(aside)
    return str(target / ARTIFACT)


def _worse(metric: str, value: float, before: float) -> bool:
    # A NaN is worse than anything.
    return not (value <= before if metric.endswith(LOWER_IS_BETTER) else value >= before)


def _exists(client: "MlflowClient", name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        return False
    return True


def _shown(root: str) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", root)
