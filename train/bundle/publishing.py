"""Publishing: register a bundle as a version of its model in MLflow, perhaps in production."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.errors import UserError
from train.bundle.bundle import WEIGHTS, Bundle
from train.bundle.challenger import Challenger, version_number
from train.bundle.manifest import flatten_options
from train.bundle.mlflow_access import (
    RegistryError,
    ensure_experiment,
    ensure_model,
    find_alias,
    mlflow_client,
    registry_errors,
)
from train.bundle.registry import (
    ARTIFACT,
    CANDIDATE,
    PRODUCTION,
    SCHEME,
    set_production,
)
from train.bundle.registry_lock import lock_registry

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Largest number of parameters that MLflow accepts in one call.
PARAM_LIMIT = 100


def bundle_summary(bundle: Bundle) -> dict[str, Any]:
    """Return the JSON that a training command prints about a bundle."""
    manifest = bundle.manifest
    return {
        "model": manifest.name,
        "version": None,
        "alias": None,
        "uri": None,
        "bundle": bundle.location,
        "metrics": manifest.metrics,
        "simple_models": {each.name: each.metrics for each in manifest.simple_models},
        "comparison": manifest.comparison,
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
    """An MLflow run that is written during training.

    The run is created at the first event, so that a command which fails before leaves no run.
    name: of the experiment. options, tags: of the run. run_id: an existing run to continue.
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
        if self._client is None or self.run_id is None:
            return
        try:
            with registry_errors(self._root):
                self._client.set_terminated(self.run_id, "FINISHED" if kind is None else "FAILED")
        except RegistryError as error:  # must not hide the outcome of the block
            print(f"MLflow still shows run {self.run_id} as running: {error}", file=sys.stderr)

    def observe(self, event: dict[str, Any]) -> None:
        """Log the figures of a training event by step or epoch; other events only begin the run.

        Raises RegistryError.
        """
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
        with registry_errors(self._root):
            client.log_batch(run_id, figures)

    def begin(self) -> tuple["MlflowClient", str]:
        """Return the client and the run's id; the first call creates the run with its options.

        Raises RegistryError.
        """
        from mlflow.entities import Param

        with registry_errors(self._root):
            if self._client is None:
                self._client = mlflow_client(self._root)
            if self.run_id is None:
                experiment = ensure_experiment(self._client, self._root, self._name)
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
    score: Callable[[Bundle, str], float] | None = None,
    candidate: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Add the bundle to its MLflow run and register it as a new version of its model.

    The version becomes production if no version is in production, or if production has the same
    weights, or if it has production's interface and is not worse in `metric` on the same validation
    records. Otherwise it becomes the candidate. The decision and its reason go to stderr. Returns
    {"version", "alias", "uri"}.

    metric: name with the split, such as "valid_loss"; None stands for the task's main metric.
    figure: replaces the bundle's own value of the metric, if that is of records it was trained on.
    score: (other bundle, metric) → value on this bundle's validation records; it is called if
    production was measured on other records, and raises UserError if it cannot compute the value.
    candidate: a reason to make the version candidate, whatever its figures.
    tags: of the version, in addition to its figures and lineage.

    Raises RegistryError if the registry cannot be read or changed, which leaves production as it
    is; UserError if the bundle does not have the metric.
    """
    client, run_id = recording.begin()
    manifest = bundle.manifest
    metric, value = _figure(bundle, metric, figure)
    with registry_errors(root):
        client.update_run(run_id, name=bundle.path.name)
        _log(client, run_id, bundle)
        client.log_artifacts(run_id, str(bundle.path), ARTIFACT)
        run = client.get_run(run_id)
        ensure_model(client, manifest.name)
        metrics = manifest.variants[manifest.default_variant].metrics
        metrics = metrics | ({metric: value} if metric else {})
        version = client.create_model_version(
            manifest.name,
            source=f"{run.info.artifact_uri}/{ARTIFACT}",
            run_id=run_id,
            tags={
                WEIGHTS: bundle.weights_digest,
                **{key: str(value) for key, value in manifest.lineage.items()},
                **(tags or {}),
                **{key: repr(figure) for key, figure in metrics.items()},
            },
        ).version
    challenger = Challenger(bundle, root, metric, value, score)
    while True:
        with registry_errors(root):
            current = find_alias(client, manifest.name, PRODUCTION)
        # Scoring production may take long, so it is done without the lock, for which others wait.
        no_worse, reason = (False, candidate) if candidate else challenger.compare(current)
        alias = PRODUCTION if no_worse else CANDIDATE
        with registry_errors(root), lock_registry(client, root) as lock:
            now = find_alias(client, manifest.name, PRODUCTION)
            if candidate is None and version_number(now) != version_number(current):
                continue  # another version has become production: compare with that one
            if no_worse:
                set_production(client, lock, manifest.name, str(version))
            else:
                lock.check()
                client.set_registered_model_alias(manifest.name, CANDIDATE, str(version))
        break
    print(f"{manifest.name} version {version} is {alias}: {reason}", file=sys.stderr)
    uri = f"{SCHEME}{manifest.name}@{alias}"
    return {"version": int(version), "alias": alias, "uri": uri}


def check_publishable(root: str, metric: str | None) -> None:
    """Check the options of `publish` before any work is done.

    Raises UserError if the registry cannot be used or the metric is not of the validation split.
    """
    storage.tracking_uri(root)
    if metric is not None and not metric.startswith("valid_"):
        raise UserError(
            f"registry.metric is '{metric}'; accepted are metrics of the validation split, such as "
            "valid_accuracy, because decisions must not use the test split."
        )


def _log(client: "MlflowClient", run_id: str, bundle: Bundle) -> None:
    """Log the final figures of the model and of each variant, and the report's pictures."""
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


def _figure(bundle: Bundle, metric: str | None, figure: float | None) -> tuple[str, float]:
    """Return the metric that decides and its value; "" and NaN for a model without metrics.

    figure: replaces the value, if given. Raises UserError if the bundle does not have the metric.
    """
    if not bundle.task.is_measured:
        return "", math.nan
    metric = metric or f"valid_{bundle.task.metric}"
    metrics = bundle.manifest.variants[bundle.manifest.default_variant].metrics
    if figure is None and metric not in metrics:
        raise UserError(f"registry.metric is '{metric}'; the model has {', '.join(metrics)}.")
    return metric, metrics[metric] if figure is None else figure
