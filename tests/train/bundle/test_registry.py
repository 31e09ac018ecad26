"""Model versions and aliases, in a real MLflow."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cluster.errors import UserError
from train.bundle import publishing, registry
from train.bundle.bundle import WEIGHTS
from train.bundle.manifest import BundleFile


def publish(bundle, root, metric):
    with publishing.RunRecorder(root, "digits", bundle.manifest.config) as recording:
        return publishing.publish(bundle, recording, root, metric)


def with_metric(bundle, metric, value):
    """The bundle as if it were of another net, its default variant with another figure."""
    manifest = bundle.manifest
    name = manifest.default_variant
    variant = manifest.variants[name]
    changed = variant.model_copy(update={"metrics": {**variant.metrics, metric: value}})
    variants = {**manifest.variants, name: changed}
    weights = BundleFile(sha256=secrets.token_hex(32), size_bytes=1)
    update = {"variants": variants, "files": {**manifest.files, WEIGHTS: weights}}
    return replace(bundle, manifest=manifest.model_copy(update=update))


def test_the_same_net_with_other_variants_replaces_the_version(bundle, tmp_path):
    root = str(tmp_path)
    better = with_metric(bundle, "valid_accuracy", 0.99)
    worse = with_metric(bundle, "valid_accuracy", 0.98)
    same = replace(
        worse, manifest=worse.manifest.model_copy(update={"files": better.manifest.files})
    )
    assert publish(better, root, "valid_accuracy")["alias"] == "production"
    assert publish(worse, root, "valid_accuracy")["alias"] == "candidate"
    assert publish(same, root, "valid_accuracy")["alias"] == "production"


def test_a_version_becomes_production_only_if_it_is_no_worse(bundle, tmp_path):
    root = str(tmp_path)
    published = [
        publish(with_metric(bundle, "valid_accuracy", value), root, "valid_accuracy")
        for value in (0.9, 0.8, 0.9, 0.95)
    ]
    assert [item["alias"] for item in published] == [
        "production",
        "candidate",
        "production",
        "production",
    ]
    assert [item["version"] for item in published] == [1, 2, 3, 4]
    assert registry.resolve_model("models:/digits@production", root)[1] == "4"
    assert registry.resolve_model("models:/digits@candidate", root)[1] == "2"
    location, version = registry.resolve_model("models:/digits/3", root)
    assert version == "3"
    assert type(bundle).load(location).manifest == bundle.manifest


def test_a_version_to_be_tried_is_candidate_whatever_its_metrics(bundle, tmp_path):
    from mlflow import MlflowClient

    from cluster import storage

    root = str(tmp_path)
    publish(with_metric(bundle, "valid_accuracy", 0.9), root, "valid_accuracy")
    better = with_metric(bundle, "valid_accuracy", 0.95)
    with publishing.RunRecorder(root, "digits", {}) as recording:
        published = publishing.publish(
            better, recording, root, None, candidate="it is new", tags={"of": "today"}
        )
    assert (published["version"], published["alias"]) == (2, "candidate")
    assert registry.resolve_model("models:/digits@production", root)[1] == "1"
    tags = MlflowClient(storage.tracking_uri(root)).get_model_version("digits", "2").tags
    assert tags["of"] == "today"
    assert float(tags["valid_accuracy"]) == 0.95


@pytest.mark.parametrize(
    ("metric", "old", "new", "alias"),
    [
        ("valid_loss", 0.5, 0.4, "production"),
        ("valid_loss", 0.5, 0.6, "candidate"),
        ("valid_loss", 0.5, float("nan"), "candidate"),
        ("valid_accuracy", 0.5, float("nan"), "candidate"),
    ],
)
def test_each_metric_has_its_direction(bundle, tmp_path, metric, old, new, alias):
    root = str(tmp_path)
    publish(with_metric(bundle, metric, old), root, metric)
    assert publish(with_metric(bundle, metric, new), root, metric)["alias"] == alias


def test_a_path_with_spaces_and_percents_is_found_again(bundle, tmp_path):
    root = str(tmp_path / "my 100% runs")
    published = publish(bundle, root, "valid_accuracy")
    location, _ = registry.resolve_model(published["uri"], root)
    assert type(bundle).load(location).manifest == bundle.manifest


def test_an_mlflow_server_keeps_the_bundle(bundle, tmp_path, monkeypatch):
    """A real server that proxies artifacts; the root has nothing but the downloaded copy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    options = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    options += ["--artifacts-destination", f"{tmp_path}/kept", "--workers", "1"]
    server = subprocess.Popen(
        [mlflow, "server", "--port", str(port), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{uri}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        root = str(tmp_path / "root")
        published = publish(bundle, root, "valid_accuracy")
        location, version = registry.resolve_model(published["uri"], root)
        assert version == "1"
        assert type(bundle).load(location).manifest == bundle.manifest
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_the_run_holds_options_curves_and_pictures(bundle, tmp_path):
    from mlflow import MlflowClient

    from cluster import storage

    root = str(tmp_path)
    with publishing.RunRecorder(root, "digits", bundle.manifest.config) as recording:
        for step in range(10, 40, 10):
            recording.observe({"event": "steps", "step": step, "loss": 1 / step})
        for epoch in range(1, 9):
            recording.observe({"event": "epoch", "epoch": epoch, "valid_accuracy": 0.9})
        published = publishing.publish(bundle, recording, root, "valid_accuracy")
    client = MlflowClient(storage.tracking_uri(root))
    run = client.get_run(client.get_model_version("digits", str(published["version"])).run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.1"
    assert len(client.get_metric_history(run.info.run_id, "valid_accuracy")) == 8
    losses = client.get_metric_history(run.info.run_id, "step/loss")
    assert [(item.step, item.value) for item in losses] == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert {"report/curves.png", "report/confusion.png", "report/variants.png"} <= pictures


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/other@production", ["models:/other@production", "train/main.py"]),
        ("models:/it's/7", ["models:/it's/7"]),
        ("models:/digits/7", ["models:/digits/7"]),
        ("models:/digits", ["models:/NAME@ALIAS"]),
        ("models:/digits/x", ["models:/NAME/VERSION"]),
    ],
)
def test_a_model_that_is_not_there_is_said_in_one_line(bundle, uri, words, storage_path):
    with pytest.raises(UserError) as caught:
        registry.resolve_model(uri, str(storage_path))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_metric_that_may_not_decide_names_those_that_may(tmp_path):
    with pytest.raises(UserError, match=r"'test_accuracy'; accepted are .* valid_accuracy, "):
        publishing.check_publishable(str(tmp_path), "test_accuracy")


def test_asking_for_a_model_makes_no_registry(tmp_path):
    with pytest.raises(UserError, match="there is no registry"):
        registry.resolve_model("models:/digits@production", str(tmp_path / "typo"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_is_marked_as_failed(bundle, tmp_path):
    from mlflow import MlflowClient

    from cluster import storage

    recording = publishing.RunRecorder(str(tmp_path), "digits", {})

    def fail():
        with recording:
            recording.observe({"event": "steps", "step": 1, "loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    client = MlflowClient(storage.tracking_uri(str(tmp_path)))
    assert client.get_run(recording.run_id).info.status == "FAILED"
