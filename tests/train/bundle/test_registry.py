"""Model versions and aliases in a real MLflow registry."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import UserError
from tests import registry_faults
from tests.mlflow_server import SETTINGS, FaultyProxy, mlflow_server
from tests.registry_faults import METRIC, aliases, with_metric
from train.bundle import publishing, registry, registry_lock
from train.bundle.manifest import FORMAT_VERSION
from train.bundle.mlflow_access import RegistryError, mlflow_client
from train.bundle.registry_lock import LOCK_NAME


def publish(bundle, root, metric, **options):
    with publishing.RunRecorder(root, "digits", bundle.manifest.config) as recording:
        return publishing.publish(bundle, recording, root, metric, **options)


def test_the_same_net_with_other_variants_replaces_the_version(bundle, tmp_path):
    root = str(tmp_path)
    better = with_metric(bundle, 0.99)
    worse = with_metric(bundle, 0.98)
    same = replace(
        worse, manifest=worse.manifest.model_copy(update={"files": better.manifest.files})
    )
    assert publish(better, root, "valid_accuracy")["alias"] == "production"
    assert publish(worse, root, "valid_accuracy")["alias"] == "candidate"
    assert publish(same, root, "valid_accuracy")["alias"] == "production"


def test_a_version_becomes_production_only_if_it_is_no_worse(bundle, tmp_path):
    root = str(tmp_path)
    published = [
        publish(with_metric(bundle, value), root, "valid_accuracy")
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


def test_publishing_as_candidate_ignores_the_metrics(bundle, tmp_path):
    from mlflow import MlflowClient

    root = str(tmp_path)
    publish(with_metric(bundle, 0.9), root, "valid_accuracy")
    better = with_metric(bundle, 0.95)
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
def test_promotion_respects_the_direction_of_the_metric(bundle, tmp_path, metric, old, new, alias):
    root = str(tmp_path)
    publish(with_metric(bundle, old, metric), root, metric)
    assert publish(with_metric(bundle, new, metric), root, metric)["alias"] == alias


def test_a_path_with_spaces_and_percent_signs_is_resolved(bundle, tmp_path):
    root = str(tmp_path / "my 100% runs")
    published = publish(bundle, root, "valid_accuracy")
    location, _ = registry.resolve_model(published["uri"], root)
    assert type(bundle).load(location).manifest == bundle.manifest


def test_an_mlflow_server_stores_and_returns_the_bundle(bundle, tmp_path, monkeypatch):
    """The server stores the artifacts; the root holds only the downloaded copy."""
    with mlflow_server(tmp_path) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        root = str(tmp_path / "root")
        published = publish(bundle, root, "valid_accuracy")
        location, version = registry.resolve_model(published["uri"], root)
        assert version == "1"
        assert type(bundle).load(location).manifest == bundle.manifest


def test_the_run_holds_options_curves_and_pictures(bundle, tmp_path):
    from mlflow import MlflowClient

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
def test_a_missing_model_is_reported_in_one_line(bundle, uri, words, storage_path):
    with pytest.raises(UserError) as caught:
        registry.resolve_model(uri, str(storage_path))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_error_for_an_unusable_metric_lists_usable_ones(tmp_path):
    with pytest.raises(UserError, match=r"'test_accuracy'; accepted are .* valid_accuracy, "):
        publishing.check_publishable(str(tmp_path), "test_accuracy")


def test_looking_up_a_model_creates_no_registry(tmp_path):
    with pytest.raises(UserError, match="there is no registry"):
        registry.resolve_model("models:/digits@production", str(tmp_path / "typo"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_is_marked_as_failed(bundle, tmp_path):
    from mlflow import MlflowClient

    recording = publishing.RunRecorder(str(tmp_path), "digits", {})

    def fail():
        with recording:
            recording.observe({"event": "steps", "step": 1, "loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    client = MlflowClient(storage.tracking_uri(str(tmp_path)))
    assert client.get_run(recording.run_id).info.status == "FAILED"


# Comparison with production


def changed_manifest(bundle, **changes):
    return replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


def with_other_records(bundle):
    """Return the bundle as if it was measured on other validation records."""
    data = bundle.manifest.data
    return changed_manifest(bundle, data={**data, "valid": {**data["valid"], "digest": "other"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {"inputs": [*m.inputs, m.inputs[0]]}, "its inputs differ"),
        (lambda m: {"outputs": m.outputs[:1]}, "its outputs differ"),
        (
            lambda m: {"task": {**m.task, "target": {**m.task["target"], "classes": ["a", "b"]}}},
            "its classes differ",
        ),
        (
            lambda m: {"task": {**m.task, "target": {**m.task["target"], "kind": "value"}}},
            "its task differs",
        ),
    ],
)
def test_a_model_with_another_interface_becomes_candidate(bundle, tmp_path, capsys, change, words):
    """Clients of the production model could not call the new one."""
    root = str(tmp_path)
    publish(with_metric(bundle, 0.1), root, METRIC)
    better = with_metric(bundle, 0.99)
    other = changed_manifest(better, **change(better.manifest))
    assert publish(other, root, METRIC)["alias"] == "candidate"
    assert f"candidate: {words} from version 1" in capsys.readouterr().err


def test_metrics_on_other_records_do_not_decide_promotion(bundle, tmp_path, capsys):
    root = str(tmp_path)
    publish(with_metric(bundle, 0.5), root, METRIC)
    other = with_other_records(with_metric(bundle, 0.9))
    assert publish(other, root, METRIC)["alias"] == "candidate"
    assert "measured on other validation records" in capsys.readouterr().err

    def unfit(production, metric):
        raise UserError("its classes are others")

    assert publish(other, root, METRIC, score=unfit)["alias"] == "candidate"
    assert "cannot be measured on these records: its classes" in capsys.readouterr().err

    for figure, alias in ((0.95, "candidate"), (0.85, "production")):

        def score(production, metric, figure=figure):
            assert production.manifest == bundle.manifest
            assert metric == METRIC
            return figure

        assert publish(other, root, METRIC, score=score)["alias"] == alias
        assert f"0.9000 against {figure:.4f} of version 1" in capsys.readouterr().err


def test_an_unreadable_production_version_is_not_replaced(bundle, tmp_path, capsys):
    root = str(tmp_path)
    published = publish(with_metric(bundle, 0.1), root, METRIC)
    (Path(registry.resolve_model(published["uri"], root)[0]) / "manifest.json").unlink()
    assert publish(with_metric(bundle, 0.9), root, METRIC)["alias"] == "candidate"
    assert "version 1 in production cannot be read" in capsys.readouterr().err


def test_a_production_version_of_an_older_format_is_replaced(bundle, tmp_path, capsys):
    """This version of the software cannot serve the old format."""
    root = str(tmp_path)
    published = publish(with_metric(bundle, 0.9), root, METRIC)
    manifest = Path(registry.resolve_model(published["uri"], root)[0]) / "manifest.json"
    current = f'"format_version": {FORMAT_VERSION}'
    assert current in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(current, '"format_version": 2'))
    assert publish(with_metric(bundle, 0.5), root, METRIC)["alias"] == "production"
    assert "version 1 has an older format" in capsys.readouterr().err


def test_a_promotion_keeps_the_old_version_as_previous(bundle, tmp_path):
    root = str(tmp_path)
    for value in (0.5, 0.6):
        publish(with_metric(bundle, value), root, METRIC)
    assert aliases(root, "digits") == {"production": "2", "previous": "1"}
    publish(with_metric(bundle, 0.1), root, METRIC)
    for _ in range(2):  # repeated, as after a failure in the middle
        registry.promote_candidate(root, "digits", "3", "2", registry_faults.DECISION)
    assert aliases(root, "digits") == {"production": "3", "previous": "2"}


def test_a_candidate_replaces_only_the_version_compared_with(bundle, tmp_path):
    root = str(tmp_path)
    publish(with_metric(bundle, 0.5), root, METRIC)
    publish(with_metric(bundle, 0.1), root, METRIC)
    publish(with_metric(bundle, 0.9), root, METRIC)
    with pytest.raises(registry.ProductionChanged, match="version 3 is now in production"):
        registry.promote_candidate(root, "digits", "2", "1", registry_faults.DECISION)
    assert aliases(root, "digits")["production"] == "3"
    assert registry.pending_candidate(root, "digits")[1] == "2"


# Failures and concurrency


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture
def proxy(server, monkeypatch):
    with FaultyProxy(server) as proxy:
        for name, value in SETTINGS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        yield proxy


@pytest.mark.slow
def test_production_does_not_change_when_the_registry_fails(bundle, proxy, tmp_path):
    """403, 500, broken and slow responses, at several requests of each operation."""
    found = registry_faults.inject_faults(bundle, proxy, str(tmp_path), most=4)
    assert found["points"] > 2 * 4 * 4
    for operation in ("publish", "roll back", "look up"):
        assert found[f"{operation}: one line"] > 0
    promoted = registry_faults.inject_promotion_faults(bundle, proxy, str(tmp_path), most=4)
    assert promoted["points"] == 4 * 4
    assert promoted["promotion: one line"] > 0


@pytest.mark.slow
def test_the_better_of_two_concurrent_models_is_production(bundle, server, tmp_path, monkeypatch):
    location = str(bundle.path)
    for folder, pairs, first_use in (("one", 4, False), ("new", 3, True)):
        root = str(tmp_path / folder)
        found = registry_faults.race(location, root, None, pairs, first_use=first_use)
        assert found == {"the better one": pairs}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    name = "two-at-once"
    found = registry_faults.race(location, str(tmp_path), server, 4, name=name, first_use=False)
    assert found == {"the better one": 4}


HOLD = """
import sys
from train.bundle import mlflow_access, registry_lock
client = mlflow_access.mlflow_client("")
with registry_lock.lock_registry(client, ""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_taken_over(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=dict(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    client, taken = mlflow_client(""), threading.Event()

    def take():
        with registry_lock.lock_registry(client, ""):
            taken.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert not taken.wait(2)
    holder.kill()
    holder.wait()
    assert taken.wait(60)
    thread.join()
    holder.stdin.close()
    holder.stdout.close()
    # One lock remains, because the numbers only grow.
    assert len(client.search_registered_models(f"name LIKE '{LOCK_NAME}%'")) == 1


@pytest.mark.slow
def test_a_delayed_process_takes_a_newer_lock_number(server, monkeypatch):
    """A process pauses between reading the highest number and registering the next one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    client = mlflow_client("")
    asked = []
    highest = registry_lock._highest

    def late(client):
        found = highest(client)
        if not asked:
            asked.append(found)
            for _ in range(2):
                number = highest(client)[0] + 1
                client.create_registered_model(f"{LOCK_NAME}{number}", tags={"released": "yes"})
            if found[0]:
                client.delete_registered_model(f"{LOCK_NAME}{found[0]}")
            client.delete_registered_model(f"{LOCK_NAME}{found[0] + 1}")
        return found

    monkeypatch.setattr(registry_lock, "_highest", late)
    with registry_lock.lock_registry(client, "") as lock:
        lock.check()
        assert highest(client)[0] == asked[0][0] + 3


def test_a_lock_about_to_expire_prevents_changes():
    with pytest.raises(RegistryError, match="too slowly"):
        registry_lock.RegistryLock(until=time.monotonic()).check()


@pytest.mark.parametrize(("score", "alias"), [(0.4, "production"), (0.6, "candidate")])
def test_a_version_without_the_metric_is_measured(bundle, tmp_path, score, alias):
    """Its net is measured on the same records; a missing figure is not the worst one."""
    root = str(tmp_path)
    publish(with_metric(bundle, 0.9), root, METRIC)
    other = with_metric(bundle, 0.5, "valid_balanced_accuracy")
    client = registry.mlflow_client(root)
    client.delete_model_version_tag("digits", "1", "valid_balanced_accuracy")
    published = publish(other, root, "valid_balanced_accuracy", score=lambda *_: score)
    assert published["alias"] == alias


def test_a_version_that_cannot_be_measured_stays(bundle, tmp_path, capsys):
    root = str(tmp_path)
    publish(with_metric(bundle, 0.9), root, METRIC)
    client = registry.mlflow_client(root)
    client.delete_model_version_tag("digits", "1", METRIC)
    assert publish(with_metric(bundle, 0.95), root, METRIC)["alias"] == "candidate"
    assert "version 1 has no such figure" in capsys.readouterr().err
