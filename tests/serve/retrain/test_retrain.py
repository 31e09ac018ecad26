"""Retraining: when it is due, that one runs at a time, and that the new version is better."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from sklearn.datasets import load_digits

from cluster import commit, storage
from cluster.errors import CommandFailed, UserError
from cluster.nodes.process_identity import ProcessIdentity
from serve.requestlog import reader
from serve.retrain import __main__ as retrain
from serve.retrain import dataset, launcher, lock
from serve.retrain.history import RetrainHistory
from serve.retrain.trigger import RetrainRules, decide_retrain
from serve.rollout import comparison
from serve.rollout.monitor_state import MonitorState
from tests.server import REPOSITORY
from tests.train.tasks.test_tasks import image_bytes
from train import cli
from train.bundle import Bundle, publishing, registry
from train.tasks import ClassTarget, Features, LabelsTarget, Task, ValueTarget

RULES = RetrainRules(windows=2, of=5, max_drop=0.02)
NOW = "2026-11-23T12:00:00+00:00"


def window(*features):
    alarms = [
        {"feature": name, "statistic": "psi", "score": 1, "threshold": 0} for name in features
    ]
    return {"rows": 500, "time": NOW, "alarms": alarms}


def watched(*windows, **feedback):
    live = {"count": 300, "metric": "accuracy", "value": 0.9, "low": 0.86, "high": 0.93}
    live = {**live, "expected": 0.9, **feedback} if feedback else None
    versions = {"3": {"windows": list(windows), "feedback": live}}
    return MonitorState.model_validate({"time": NOW, "production": "3", "versions": versions})


QUIET, LOUD = window(), window("age", "town")


@pytest.mark.parametrize(
    ("state", "due", "words"),
    [
        (None, False, "version 3 has not been monitored"),
        (MonitorState(time=NOW, production="2", versions={}), False, "has not been monitored"),
        (watched(), False, "0 of the last 0 windows"),
        (watched(LOUD), False, "1 of the last 1 windows drifted (age, town); 2 of 5 are needed"),
        (watched(LOUD, QUIET, QUIET, QUIET, LOUD), True, "2 of the last 5 windows drifted (age"),
        (watched(LOUD, LOUD, QUIET, QUIET, QUIET, QUIET), False, "1 of the last 5"),
        (watched(QUIET, expected=0.95), False, "0.9 [0.86, 0.93] of 300, 0.95 expected"),
        (watched(QUIET, expected=0.96), True, "live accuracy 0.9 [0.86, 0.93] of 300, 0.96 expect"),
        (watched(QUIET, metric="rmse", low=8, high=9, expected=7.9), False, "up to 0.2 worse"),
        (watched(QUIET, metric="rmse", low=8, high=9, expected=7.7), True, "live rmse"),
        (watched(LOUD, LOUD, expected=0.9), True, "windows drifted"),
    ],
)
def test_retraining_is_due_by_drift_or_by_live_metrics(state, due, words):
    unit = 10 if state is not None and "rmse" in state.model_dump_json() else 1
    decision = decide_retrain(state, "3", RetrainRules(2, 5, 0.02, unit))
    assert decision.due is due
    assert words in decision.reason


def test_a_monitors_state_is_read_as_written_or_refused(tmp_path):
    assert MonitorState.read(str(tmp_path), "m") is None
    state = watched(LOUD, QUIET, expected=0.9)
    state.write(str(tmp_path), "m")
    assert MonitorState.read(str(tmp_path), "m") == state
    (tmp_path / "monitor" / "m.json").write_text('{"versions": {"3": {"windows": 5}}}')
    with pytest.raises(UserError, match=r"m\.json' is not the state of a monitor .* delete it"):
        MonitorState.read(str(tmp_path), "m")


def test_losses_are_wrong_classes_or_squared_errors():
    def task(target):
        return Task(Features(()), target)

    names = {"label": np.array(["a", "b", "b"], dtype=object)}
    one = task(ClassTarget("y", ("a", "b")))
    assert comparison.record_losses(one, names, ["a", "a", "b"]).tolist() == [0, 1, 0]
    several = task(LabelsTarget("y", ("a", "b")))
    answers = {"label": np.array(["a|b", "", "b"], dtype=object)}
    assert comparison.record_losses(several, answers, ["b|a", "", "a|b"]).tolist() == [0, 0, 1]
    number = task(ValueTarget("y", 0.0, 1.0))
    assert comparison.record_losses(
        number, {"value": np.array([1.0, 3.0])}, [2.0, 3.0]
    ).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("before", "after", "improved"),
    [
        ([1] * 10, [0] * 10, True),
        ([1] * 5 + [0] * 5, [0] * 10, False),  # p is 0.06
        ([0] * 10, [1] * 10, False),
        # Most errors became smaller, but one became so large that the mean grows.
        ([1] * 12, [0.5] * 11 + [100], False),
    ],
)
def test_an_improvement_is_in_the_metric_and_significant(before, after, improved):
    losses = np.array([before, after], float)
    assert comparison.compare_losses(losses, in_numbers=True).improved is improved
    if losses.max() <= 1:
        assert comparison.compare_losses(losses, in_numbers=False).improved is improved


# One retraining at a time


@pytest.fixture(params=["path", "URL"])
def lease_url(tmp_path, request):
    return f"{tmp_path}/new/digits.lease" if request.param == "path" else f"file://{tmp_path}/lease"


def test_a_lease_has_one_holder_and_is_released(lease_url):
    with lock.hold_lock(lease_url, hours=1) as own:
        own.check()
        with (
            pytest.raises(lock.LockHeld, match=f"{socket.gethostname()}, process {os.getpid()}"),
            lock.hold_lock(lease_url, hours=1),
        ):
            pytest.fail("two processes hold the lease")
        own.check()
    with lock.hold_lock(lease_url, hours=1):
        pass
    assert not os.path.exists(urllib.parse.urlparse(lease_url).path)


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, False),
        ({"host": "another", "pid": 1}, False),
        ({"host": "another", "pid": 1, "time": time.time() - 3700}, True),
        ({"pid": 2**22 + 1}, True),  # above the highest possible process id
        # The process id was reused, or the host was rebooted.
        ({"started": 1}, True),
        ({"boot": "another"}, True),
        ({"machine": "another", "started": 1}, False),
    ],
)
def test_a_stale_lease_is_taken_over(lease_url, changes, stale):
    holder = {**ProcessIdentity.current().to_dict(), "time": time.time(), "token": "x"}
    commit.write_atomic(lease_url, json.dumps({**holder, **changes}).encode())
    if not stale:
        with pytest.raises(lock.LockHeld), lock.hold_lock(lease_url, hours=1):
            pytest.fail("two processes hold the lease")
        return
    with lock.hold_lock(lease_url, hours=1) as own:
        own.check()


def test_a_process_that_lost_its_lease_ends_and_leaves_it(lease_url):
    with lock.hold_lock(lease_url, hours=1) as own:
        commit.write_atomic(lease_url, json.dumps({**own.holder, "token": "other"}).encode())
        with pytest.raises(CommandFailed, match="taken over"):
            own.check()
    assert json.loads(storage.filesystem(lease_url)[0].cat_file(lease_url))["token"] == "other"


def test_the_cooldown_begins_at_the_last_entry_of_the_history(tmp_path):
    state = RetrainHistory(str(tmp_path), "digits")
    assert state.cooling(24) is None
    now = datetime.now(UTC)
    for hours in range(30, 2, -1):
        began = (now - timedelta(hours=hours)).isoformat()
        state.note({"began": began, "outcome": "began"})
        state.note({"began": began, "outcome": "refused"})
    history = state.history()
    assert len(history) == 20
    assert {entry["outcome"] for entry in history} == {"refused"}
    assert "3.0 h ago; --cooldown-hours is 24" in state.cooling(24)
    assert state.cooling(2.9) is None


# Records to train on


def table(truths, **columns):
    count = len(truths)
    records = [{name: values[row] for name, values in columns.items()} for row in range(count)]
    return pa.table(
        {"id": [f"request-{row // 2}" for row in range(count)], "record": records, "truth": truths}
    )


def test_only_truths_that_are_valid_for_the_task_are_used():
    names = Task(Features(()), ClassTarget("y", ("a", "b")))
    several = Task(Features(()), LabelsTarget("y", ("a", "b")))
    number = Task(Features(()), ValueTarget("y", 0.0, 1.0))
    for task, truths, wanted in (
        (names, ["a", None, "c", "b"], ["a", "b"]),
        (several, ["a|b", "", "a|c", None], ["a|b", ""]),
        (number, [1.5, float("nan"), None, float("inf")], [1.5]),
    ):
        found = dataset.usable_rows(table(truths, n=[0.0] * 4), task)
        assert found["truth"].to_pylist() == wanted


def test_requests_stay_in_their_split_when_others_are_added():
    task = Task(Features.of({"n": {"kind": "number"}}), ClassTarget("y", ("a", "b")))
    count = 2000
    truths = ["a", "b"] * (count // 2)
    parts = dataset.split_labelled(table(truths, n=list(range(count)), other=["x"] * count), task)
    assert parts.training.column_names == parts.held_out.column_names == ["n", "y"]
    training, held_out = (set(part["n"].to_pylist()) for part in (parts.training, parts.held_out))
    assert training | held_out == set(range(count))
    assert not training & held_out
    # Both rows of a request are in the same part.
    assert {row ^ 1 for row in held_out} == held_out
    assert len(held_out) / count == pytest.approx(0.3, abs=0.05)
    again = dataset.split_labelled(table(truths * 2, n=list(range(count)) * 2), task)
    assert set(again.held_out["n"].to_pylist()) == held_out
    assert set(again.training["n"].to_pylist()) == training
    some = dataset.split_labelled(table(truths[:500], n=list(range(500))), task)
    assert set(some.held_out["n"].to_pylist()) == {row for row in held_out if row < 500}


def test_a_held_out_record_is_not_trained_on():
    """The record occurs alone, and again in a request whose other record is a training record."""
    task = Task(Features.of({"n": {"kind": "number"}}), ClassTarget("y", ("a", "b")))
    parts = dataset.split_labelled(table(["a", "b"] * 500, n=list(range(1000))), task)
    held_out = sorted(set(parts.held_out["n"].to_pylist()))
    learned = sorted(set(parts.training["n"].to_pylist()))
    # Requests of two rows: the first is a training record, the second a held-out record.
    pairs = [each for pair in zip(learned[::2], held_out, strict=False) for each in pair]
    values = list(range(1000)) + pairs
    both = dataset.split_labelled(table(["a"] * len(values), n=values), task)
    assert not set(both.training["n"].to_pylist()) & set(both.held_out["n"].to_pylist())
    assert set(both.training["n"].to_pylist()) <= set(learned)


def test_an_empty_log_gives_no_training_records(tmp_path):
    task = Task(Features.of({"n": {"kind": "number"}}), ClassTarget("y", ("a", "b")))
    nothing = reader.read_labelled(str(tmp_path), "digits")
    new = dataset.split_labelled(dataset.usable_rows(nothing, task), task)
    assert len(new.training) == len(new.held_out) == 0


def test_requests_without_a_field_are_named():
    task = Task(Features.of({"n": {"kind": "number"}}), ClassTarget("y", ("a", "b")))
    with pytest.raises(UserError, match="no field 'n'; they have m"):
        dataset.split_labelled(table(["a"], m=[1.0]), task)


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "a/b"], "--model"),
        (["--model", "digits", "--mix", "2"], "--mix"),
        (["--model", "digits", "--min-labelled", "0"], "--min-labelled"),
        (["--model", "digits", "--often"], "--often"),
        ([], "--model"),
    ],
)
def test_a_wrong_option_is_named(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        retrain.parse(arguments)
    assert "\n" not in str(caught.value)


def test_options_are_read_from_the_command_line():
    given = ["--model", "digits", "--dry-run", "--max-drop", "0.1", "--cooldown-hours", "2"]
    options = retrain.parse(given)
    assert (options.dry_run, options.check, options.max_drop) == (True, False, 0.1)
    assert options.cooldown_hours == 2


@pytest.fixture(scope="module")
def root(bundle, tmp_path_factory):
    """A storage path whose registry has the digits model in production as version 1."""
    root = str(tmp_path_factory.mktemp("retrain"))
    with publishing.RunRecorder(root, "digits", bundle.manifest.config) as recording:
        publishing.publish(bundle, recording, root, None)
    return root


@pytest.fixture
def written(root):
    """A function that writes the monitor's state, which is removed after the test."""

    def write(state):
        changes = {"production": "1", "versions": {"1": state.versions["3"]}}
        state.model_copy(update=changes).write(root, "digits")

    yield write
    for folder in ("monitor", "retrain"):
        fs, path = storage.filesystem(storage.join_path(root, folder))
        if fs.exists(path):
            fs.rm(path, recursive=True)


def inverted(count):
    """Return labelled requests for digits with inverted brightness, which training did not have."""
    digits = load_digits()
    images = (255 - digits.images[:count] * 15.9).astype(np.uint8)
    records = [{"image": image_bytes(image)} for image in images]
    ids = [f"request-{row}" for row in range(count)]
    truths = [str(label) for label in digits.target[:count]]
    return pa.table({"id": ids, "record": records, "truth": truths})


def log(requests, root):
    """Store labelled requests the way the server does: requests and labels in separate files."""
    now = datetime.now(UTC)
    columns = {
        "id": requests["id"],
        "row": pa.array([0] * requests.num_rows, pa.int32()),
        "time": pa.array([now] * requests.num_rows, pa.timestamp("us", tz="UTC")),
    }
    for kind, name in (("requests", "record"), ("feedback", "truth")):
        buffer = pa.BufferOutputStream()
        pa.parquet.write_table(pa.table({**columns, name: requests[name]}), buffer)
        url = storage.join_path(root, kind, "digits", f"{int(now.timestamp() * 1000)}-test.parquet")
        commit.write_atomic(url, buffer.getvalue().to_pybytes())


def never(*arguments):
    pytest.fail("nothing should be trained or read")


@pytest.mark.parametrize(
    ("state", "changes", "due", "reason"),
    [
        (watched(QUIET), {}, False, "0 of the last 1 windows"),
        (watched(LOUD, LOUD), {}, True, "20 labelled records are too few; 200 are needed"),
        (watched(LOUD, LOUD), {"dry_run": True, "min_labelled": 20}, True, "train here for 2 epo"),
        (watched(QUIET), {"force": True}, True, "20 labelled records are too few"),
        (watched(QUIET), {"force": True, "dry_run": True, "min_labelled": 9}, True, "would train"),
    ],
)
def test_the_reason_not_to_train_is_reported(root, written, state, changes, due, reason, capsys):
    written(state)
    options = retrain.RetrainOptions(model="digits", storage=root, **changes)
    result = retrain.retrain(options, lambda *_: inverted(20), never)
    assert (result["retrained"], result["due"]) == (False, due)
    assert reason in result["reason"]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"digits: retraining is {'due (' if due else 'not due: '}")
    assert not storage.filesystem(root)[0].exists(storage.join_path(root, "retrain"))


def test_a_failed_training_is_recorded_and_starts_the_cooldown(root, written):
    written(watched(LOUD, LOUD))
    options = retrain.RetrainOptions(model="digits", storage=root, min_labelled=20)

    def fail(config_url, submit, timeout_s):
        assert timeout_s == 6 * 3600
        with (
            pytest.raises(lock.LockHeld),
            lock.hold_lock(RetrainHistory(root, "digits").url("lease"), hours=1),
        ):
            pytest.fail("another retraining could start")
        raise CommandFailed("training ended with exit 1")

    with pytest.raises(CommandFailed):
        retrain.retrain(options, lambda *_: inverted(20), fail)
    (entry,) = RetrainHistory(root, "digits").history()
    assert (entry["outcome"], entry["reason"]) == ("failed", "training ended with exit 1")
    result = retrain.retrain(options, lambda *_: inverted(20), never)
    assert "the last training began 0.0 h ago; --cooldown-hours is 24" in result["reason"]
    forced = options.model_copy(update={"force": True})
    with pytest.raises(CommandFailed):
        retrain.retrain(forced, lambda *_: inverted(20), fail)


def test_retraining_uses_productions_config_with_changes(root, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = retrain.RetrainOptions(model="digits", storage=root, mix=0.25)
    own = bundle.manifest.config
    elsewhere = {**own, "data": {**own["data"], "test": "test.csv"}}
    changed = bundle.manifest.model_copy(update={"config": elsewhere})
    production = Bundle(bundle.location, bundle.path, changed)
    values = retrain.training_config_of(options, root, production, "7", f"{root}/extra.parquet")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = cli.parse(["--config", f"file://{tmp_path}/config.yaml"]).config
    assert (config.init, config.optim.epochs) == ("models:/digits/7", own["optim"]["epochs"] // 3)
    assert (config.data.extra, config.data.extra_fraction) == (f"{root}/extra.parquet", 0.25)
    assert (config.data.train, config.data.test) == ("sklearn:digits", f"{tmp_path}/test.csv")
    assert (config.registry.enabled, config.storage.path) == (False, root)
    for name in ("net", "compress", "features", "augment", "seed", "workers"):
        assert config.model_dump(mode="json")[name] == own[name]


def test_the_result_is_the_last_json_line_with_a_bundle():
    log = '{"bundle": "a"}\nwords\n{"bundle": "b"}\n{"other": 1}\nShutting down\n'
    assert launcher.parse_result(log) == {"bundle": "b"}
    with pytest.raises(CommandFailed, match="without its JSON line"):
        launcher.parse_result("words\n")


def test_an_address_without_a_dashboard_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--submit is '{address}'"):
            launcher.run_training("config.yaml", address, 1)


@pytest.mark.ray
@pytest.mark.slow
def test_drifted_requests_lead_to_a_better_candidate(root, written, bundle):
    written(watched(LOUD, QUIET, LOUD))
    log(inverted(700), root)
    arguments = ["--model", "digits", "--storage", root, "--epochs", "4", "--check"]
    command = [sys.executable, "-m", "serve.retrain", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["retrained"], result["outcome"]) == (True, "registered")
    assert (result["version"], result["alias"]) == (2, "candidate")
    assert registry.resolve_model("models:/digits@production", root)[1] == "1"
    location, version = registry.resolve_model("models:/digits@candidate", root)
    assert version == "2"

    candidate = Bundle.load(location)
    assert candidate.manifest.lineage["init"] == "models:/digits/1"
    assert candidate.manifest.data["test"] == bundle.manifest.data["test"]
    # Equal except for the temperature, which belongs to the net.
    assert candidate.task.calibrated(1.0).to_dict() == bundle.task.calibrated(1.0).to_dict()
    figures = result["figures"]
    assert figures["new_after"] > 0.8 > 0.5 > figures["new_before"]
    assert figures["test_accuracy"] >= figures["production_test_accuracy"] - 0.02
    # The candidate was not trained on the records that judge it.
    learned = pyarrow.parquet.read_table(candidate.manifest.config["data"]["extra"])
    assert learned.num_rows + result["num_held_out"] == 700
    assert figures["new_num_records"] == result["num_held_out"]

    (entry,) = RetrainHistory(root, "digits").history()
    assert {**entry, "model": "digits", "retrained": True, "due": True} == result
    again = retrain.retrain(retrain.parse(arguments), never, never)
    assert "the last training began" in again["reason"]


@pytest.mark.parametrize("model", ["digits", "models:/digits@production"])
def test_a_model_is_named_or_referenced(model):
    assert retrain.RetrainOptions(model=model).model == "digits"
