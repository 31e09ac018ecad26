"""Complete studies with real trials: killed, resumed, with populations, with several workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from mlflow import MlflowClient

from cluster import storage
from cluster.errors import UserError
from tests.conftest import QUICK, run_main
from tests.gloo import run_workers
from tests.server import REPOSITORY
from tests.test_end_to_end import processes
from tests.train.distributed.test_faults import wait_for
from train.bundle import Bundle
from train.cli import parse as parse_training
from train.data import dataset
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Loop
from tune import StudyConfig, report
from tune import tune as tune_from_python
from tune.cli import parse
from tune.run.study_store import Study

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRIALS = 4
# One trial at a time, so that proposals do not depend on timing.
COMMAND = (
    *("--num-trials", str(TRIALS), "--tune.parallel", "1"),
    *("--optim.epochs", "6", "--precision", "fp32"),
)
SMALL = {
    "name": "digits",
    "task_type": "classification",
    "features": {"image": "image"},
    "data": {"train": "sklearn:digits"},
    "net": {"widths": [16, 32]},
    "optim": {"epochs": 4, "batch_size": 64},
    "precision": "fp32",
    "workers": {"num": 1},
    "compress": {"measure_seconds": 0.2, "max_accuracy_drop": 0.05},
    "registry": {"enabled": False},
}


def kept(root, name="digits"):
    return Study.load(f"{root}/studies/{name}")


def facts(study):
    """Return the parts of trials that do not depend on timing."""
    return [
        (
            trial.values,
            trial.state,
            [(row["epoch"], row["train_loss"], row["valid_loss"]) for row in trial.rows],
        )
        for trial in study.trials
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def undisturbed(root):
    """The result that the command printed."""
    done = run_main([*COMMAND, "--storage.path", str(root)], "tune/main.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def reference(worker, config, data, folder):
    Loop(config, data, worker, CheckpointManager(str(folder), keep=1), num_micro_batches=1).run()


def test_the_command_ends_in_a_registered_winner(undisturbed, root):
    study = kept(root)
    assert undisturbed["num_trials"] == TRIALS == len(study.trials)
    assert undisturbed["uri"] == "models:/digits@production"
    complete = study.in_state("complete")
    best = min(complete, key=lambda trial: min(row["valid_loss"] for row in trial.rows))
    assert undisturbed["trial"] == best.number
    lineage = Bundle.load(undisturbed["bundle"]).manifest.lineage
    assert (lineage["study"], lineage["trial"]) == ("digits", best.number)
    assert undisturbed["objectives"] == lineage["objectives"] == study.measured(best)
    pictures = {path.name for path in Path(undisturbed["report"]).iterdir()}
    assert {"history.png", "parallel.png", "rungs.png", "report.md"} <= pictures


def test_the_best_config_trains_the_winner_again(undisturbed, tmp_path):
    config = parse_training(["--config", undisturbed["best_config"]]).config
    run_workers(
        1, reference, config, dataset.prepare_dataset(config, str(tmp_path)), tmp_path / "run"
    )
    expected = load_best_weights(CheckpointManager(str(tmp_path / "run"), keep=1))[0]
    weights = safetensors.torch.load_file(Path(undisturbed["bundle"]) / "weights.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_a_stopped_trial_makes_room_for_the_next(undisturbed, root):
    study = kept(root)
    assert study.in_state("stopped")
    for trial, following in zip(study.trials, study.trials[1:], strict=False):
        pause = following.began - trial.ended_at
        assert -0.05 < pause < 3
        assert following.epoch > 0


def test_mlflow_has_a_run_for_the_study_and_one_for_each_trial(undisturbed, root):
    client = MlflowClient(storage.tracking_uri(str(root)))
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    children = {run.data.tags.get("trial"): run for run in runs if run is not parent}
    for trial in kept(root).trials:
        run = children[str(trial.number)]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["valid_loss"] == trial.rows[-1]["valid_loss"]
        assert float(run.data.params["optim.lr"]) == trial.values["optim.lr"]
    version = client.get_model_version_by_alias("digits", "production")
    assert version.tags["study"] == "digits"
    assert version.run_id == children[None].info.run_id


def test_a_finished_study_continues_only_with_more_trials(undisturbed, root):
    arguments = [*COMMAND, "--storage.path", str(root)]
    again = run_main(arguments, "tune/main.py")
    assert json.loads(again.stdout) == undisturbed
    assert "a larger --num-trials continues it" in again.stderr
    before = facts(kept(root))
    more = run_main([*arguments, "--num-trials", str(TRIALS + 1)], "tune/main.py")
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout)["num_trials"] == TRIALS + 1
    assert facts(kept(root))[:TRIALS] == before
    client = MlflowClient(storage.tracking_uri(str(root)))
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    tracked = sorted(int(run.data.tags["trial"]) for run in runs if "trial" in run.data.tags)
    assert tracked == list(range(TRIALS + 1))


def killed_when(root, condition):
    """Start the command, and kill it and what it started once the study meets the condition.

    If the driver alone is killed, Ray's workers notice it after a minute.
    """
    (root / "log").touch()
    with (root / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "tune/main.py", *QUICK, *COMMAND, "--storage.path", str(root)],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    others = processes()

    def reached():
        folder = Path(root, "studies/digits")
        return (folder / "study.json").exists() and condition(kept(root))

    wait_for(reached, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Its Ray processes end by themselves.
    wait_for(lambda: not processes().keys() - others.keys())


def test_a_driver_killed_repeatedly_finds_the_same_trials(undisturbed, root, tmp_path):
    for count in (2, 3):

        def begun(study, count=count):
            return len(study.trials) >= count

        killed_when(tmp_path, begun)
        assert len(kept(tmp_path).trials) < TRIALS
    arguments = [*COMMAND, "--storage.path", str(tmp_path), "--registry.enabled", "false"]
    done = run_main(arguments, "tune/main.py")
    assert done.returncode == 0, done.stderr
    assert facts(kept(tmp_path)) == facts(kept(root))[:TRIALS]
    result = json.loads(done.stdout)
    assert result["objectives"] == undisturbed["objectives"]


# With Ray in this process


def tune(folder, options, **tune):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **options, "tune": {"study": "s", **tune}}))
    config = parse(["--config", str(path), "--storage.path", str(folder)])
    return tune_from_python(config), kept(folder, "s")


# Fails at a learning rate of 10 after some steps.
FRAGILE = {
    "net": "tests.fragile:Fragile",
    "optim": {"name": "sgd", "epochs": 4, "batch_size": 64},
    "compress": {"variants": [], "measure_seconds": 0.2},
}
LR = {"optim.lr": {"loguniform": [0.005, 1]}}


def test_a_population_trial_takes_over_from_a_better_one(ray_session, tmp_path):
    space = {**LR, "net.dropout": {"uniform": [0, 0.5]}}
    result, study = tune(
        tmp_path,
        {"optim": {"epochs": 6, "batch_size": 64}},
        space=space,
        num_trials=6,
        objectives=["valid_loss"],
        scheduler={"name": "pbt", "interval_epochs": 2},
    )
    assert [trial.epoch for trial in study.trials] == [6] * 6
    takers = [trial for trial in study.trials if trial.takeovers]
    assert takers
    for trial in takers:
        last = trial.takeovers[-1]
        donor = study.trials[last.donor]
        # Its history up to the takeover is the donor's, like its weights.
        if not any(each.epoch > last.epoch for each in donor.takeovers):
            assert trial.rows[: last.epoch] == donor.rows[: last.epoch]
        worst = max(study.trials, key=lambda each: each.rows[last.epoch - 1]["valid_loss"])
        assert last.rows[-1]["valid_loss"] >= worst.rows[last.epoch - 1]["valid_loss"]
        for name, dimension in study.config.tune.space.items():
            assert 0 <= dimension.place(trial.values[name]) <= 1
        row = f"at epoch {last.epoch} it continued from trial {last.donor}"
        assert row in report.trials_table(study, None)
    winner = study.trials[result["trial"]]
    lineage = Bundle.load(result["bundle"]).manifest.lineage
    assert len(lineage["takeovers"]) == len(winner.takeovers)


def test_a_population_continues_when_an_awaited_trial_fails(ray_session, tmp_path):
    _, study = tune(
        tmp_path,
        FRAGILE,
        space={"optim.lr": {"choice": [0.01, 10]}},
        num_trials=4,
        sampler="random",
        scheduler={"name": "pbt", "interval_epochs": 2},
    )
    assert study.in_state("failed")
    assert study.in_state("complete")
    assert not study.in_state("running")


def test_trials_with_workers_free_their_cpus_for_the_next(ray_session, tmp_path):
    result, study = tune(
        tmp_path,
        {"workers": {"num": 2}, "optim": {"epochs": 3, "batch_size": 64}},
        space={"optim.lr": {"choice": [0.1, 0.001]}},
        objectives=["valid_loss"],
        num_trials=5,
    )
    assert study.in_state("stopped")
    assert not study.in_state("running", "failed")
    assert result["num_trials"] == 5


def test_objectives_of_variants_and_a_winner_trained_on_all_data(ray_session, tmp_path):
    result, study = tune(
        tmp_path,
        {
            "registry": {"enabled": True},
            "optim": {"epochs": 2, "batch_size": 64},
            "stop": {"metric": "valid_loss", "patience": 1, "folds": 5},
        },
        space={"net.widths": {"choice": [[8, 16], [64, 128]]}},
        objectives=["int8_static.valid_accuracy", "int8_static.p50_ms@32"],
        pick="best int8_static.valid_accuracy with int8_static.p50_ms@32 <= 1e3",
        num_trials=4,
        refit=True,
    )
    assert [trial.state for trial in study.trials] == ["complete"] * 4
    by_width = {
        trial.values["net.widths"][0]: study.measured(trial)["int8_static.p50_ms@32"]
        for trial in study.trials
    }
    assert len(by_width) == 2
    assert by_width[8] < by_width[64]
    manifest = Bundle.load(result["bundle"]).manifest
    splits = manifest.data
    counts = {name: splits[name]["num_records"] for name in ("train", "valid", "test")}
    assert sum(counts.values()) - counts["valid"] == 1797
    # The registry holds the trial's metric on records that the trial was not trained on.
    client = MlflowClient(storage.tracking_uri(str(tmp_path)))
    version = client.get_model_version_by_alias("digits", "production")
    rows = study.trials[result["trial"]].rows
    best = min(rows, key=lambda row: row["valid_loss"])["epoch"]
    assert manifest.config["stop"] == {"folds": 0, "after": best} | {"patience": 1, "metric": None}
    history = json.loads((Path(result["bundle"]) / "report" / "history.json").read_text())
    assert len(history) == best
    assert float(version.tags["valid_accuracy"]) in [row["valid_accuracy"] for row in rows]


def test_a_failed_trial_is_reported_and_the_search_continues(ray_session, tmp_path, capsys):
    result, study = tune(
        tmp_path,
        FRAGILE,
        space={"optim.lr": {"choice": [0.01, 10]}},
        num_trials=4,
        scheduler={"name": "none"},
    )
    failed = study.in_state("failed")
    assert failed
    assert len(failed) < 4
    assert all(trial.values["optim.lr"] == 10 for trial in failed)
    assert failed[0].cause == "RuntimeError: weights are out of hand"
    assert f"trial {failed[0].number} failed: RuntimeError: weights" in capsys.readouterr().err
    assert result["trial"] not in [trial.number for trial in failed]


@pytest.mark.parametrize(
    ("options", "study", "words"),
    [
        ({}, {"space": LR, "objectives": ["valid_r2"]}, ["valid_r2", "valid_accuracy"]),
        ({}, {"space": LR, "parallel": 9}, ["tune.parallel is 9", "holds 4"]),
        ({}, {"space": {"net.widths": {"choice": [[8], [8, 8, 8, 8]]}}}, ["8×8", "net.widths"]),
        ({"workers": {"num": [1, 2]}}, {"space": LR}, ["workers.num", "fixed number of workers"]),
        ({}, {"space": LR, "pick": "best thing"}, ["thing"]),
    ],
)
def test_wrong_input_is_refused_before_any_trial(ray_session, tmp_path, options, study, words):
    with pytest.raises(UserError) as error:
        tune(tmp_path, options, **study)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "studies").exists()


def test_the_same_command_resumes_a_search_that_ran_out_of_time(ray_session, tmp_path):
    options = {"optim": {"epochs": 400, "batch_size": 64}}
    study = {"space": LR, "num_trials": 2, "scheduler": {"name": "none"}}
    started = time.monotonic()
    with pytest.raises(Exception, match="--max-minutes"):
        tune(tmp_path, options, max_minutes=0.15, **study)
    assert time.monotonic() - started < 60
    trials = kept(tmp_path, "s").trials
    assert {trial.state for trial in trials} == {"running"}
    reached = [trial.epoch for trial in trials]
    # On a busy machine workers may need longer than this to start.
    for _ in range(5):
        with pytest.raises(Exception, match="--max-minutes"):
            tune(tmp_path, options, max_minutes=0.25, **study)
        resumed = [trial.epoch for trial in kept(tmp_path, "s").trials]
        if all(now > before for now, before in zip(resumed, reached, strict=True)):
            return
    pytest.fail(f"the trials stay at epochs {reached}")


def test_trials_read_data_by_a_relative_path(ray_session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{number % 7},{'yes' if number % 7 > 3 else 'no'}" for number in range(200)]
    Path("table.csv").write_text("\n".join(["x,y", *rows]))
    config = StudyConfig(
        target="y",
        data={"train": "table.csv"},
        optim={"epochs": 1, "batch_size": 64},
        stop={"folds": 0},
        compress={"variants": [], "measure_seconds": 0.2},
        registry={"enabled": False},
        workers={"num": 1},
        tune={"space": LR, "num_trials": 1},
    )
    result = tune_from_python(config)
    assert result["model"] == result["study"] == "table"
    assert result["num_trials"] == 1
    assert result["objectives"].keys() == {"valid_accuracy"}
