"""Publishing: a bundle becomes a version of its model in MLflow, perhaps in production."""

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.errors import UserError
from train.bundle.bundle import WEIGHTS, Bundle
from train.bundle.manifest import flatten_options
from train.bundle.registry import (
    ARTIFACT,
    CANDIDATE,
    PRODUCTION,
    SCHEME,
    is_registered,
    mlflow_client,
    production_version,
)
from train.tasks.targets import LOWER_IS_BETTER

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What MLflow takes in one call.
PARAM_LIMIT = 100


def bundle_summary(bundle: Bundle) -> dict[str, Any]:
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


class RunRecorder:
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

    def __enter__(self) -> "RunRecorder":
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
            self._client = mlflow_client(self._root)
        if self.run_id is None:
            experiment = _experiment(self._client, self._root, self._name)
            self.run_id = self._client.create_run(experiment, tags=self._tags).info.run_id
            options = flatten_options(self._options)
            params = [Param(key, str(value)[:500]) for key, value in options.items()]
            self._client.log_batch(self.run_id, params=params[:PARAM_LIMIT])
        return self._client, self.run_id


def publish(
    bundle: Bundle,
    recording: RunRecorder,
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

    current = production_version(client, manifest.name)
    if current is None and not is_registered(client, manifest.name):
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


def check_publishable(root: str, metric: str | None) -> None:
    """Raises UserError for what `publish` would refuse, before any work is done."""
    storage.tracking_uri(root)
    if metric is not None and not metric.startswith("valid_"):
        raise UserError(
            f"registry.metric is '{metric}'; accepted are metrics of the validation split, such as "
            "valid_accuracy, as no choice sees the test split."
        )


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


def _worse(metric: str, value: float, before: float) -> bool:
    # A NaN is worse than anything.
    return not (value <= before if metric.endswith(LOWER_IS_BETTER) else value >= before)
