"""Parts of a search: space, objectives, study files, sampler, scheduler, winner and report."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

from cluster.errors import CommandFailed, UserError
from tests.conftest import make_config
from tests.server import REPOSITORY
from train.bundle.manifest import BATCH_SIZES, Manifest, Timing, Variant
from train.config import validate_as
from train.loop.run_directory import Run
from train.tasks import Metric
from tune import objectives, report, search_space
from tune.cli import parse
from tune.config import SchedulerConfig, StudyConfig, TuneConfig
from tune.reports.progress import StudyDisplay
from tune.run import trainable
from tune.run.sampler import TrialSampler
from tune.run.schedulers import ReplayedScheduler, SchedulerContext, create_scheduler
from tune.run.study_store import Study, lock_study
from tune.search_space import Dimension
from tune.selection import broken_rule, select_winner
from tune.tuner import refit_config

METRICS = (Metric("accuracy", "higher"), Metric("loss", "lower"))
LOSS = Metric("valid_loss", "lower")
SPACE = {
    "optim.lr": {"loguniform": [0.001, 1]},
    "net.dropout": {"uniform": [0, 0.5]},
    "net.widths": {"choice": [[16, 32], [32, 64], [64, 128]]},
    "optim.epochs": {"integer": [4, 12]},
}


def study_config(seed=0, **tune):
    values = {"name": "digits", "data": {"train": "sklearn:digits"}, "optim": {"epochs": 9}}
    values["seed"] = seed
    return validate_as(StudyConfig, {**values, "tune": {"space": SPACE, **tune}})


def new_study(folder, **tune):
    return Study.open(str(folder / "studies" / "s"), study_config(**tune), METRICS, LOSS)


def figures(epoch, loss):
    return {"epoch": epoch, "valid_loss": loss, "valid_accuracy": 1 - loss / 10, "seconds": 1.0}


def play(study, sampler, *, losses=lambda values, epoch: values["optim.lr"] / epoch, epochs=3):
    """Add a trial whose loss is a function of its options."""
    values, notes = sampler.propose()
    trial = study.begin(values, notes)
    for epoch in range(1, epochs + 1):
        study.report(trial, figures(epoch, losses(values, epoch)))
    study.end(trial, "complete" if trial.number % 3 else "stopped")
    return trial


# Space


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "0 are given"),
        ({"uniform": [0, 1], "choice": [1]}, "2 are given"),
        ({"uniform": [1, 0]}, "lower end first"),
        ({"uniform": [1, 1]}, "not a range"),
        ({"loguniform": [0, 1]}, "above 0"),
        ({"choice": []}, "empty"),
        ({"uniform": [0, float("inf")]}, "not a range"),
    ],
)
def test_an_invalid_dimension_is_refused_with_a_reason(given, words):
    with pytest.raises(ValueError, match=words):
        Dimension.model_validate(given)


@pytest.mark.parametrize("given", SPACE.values(), ids=SPACE.keys())
def test_values_survive_the_round_trip_through_optuna(given, rng):
    dimension = Dimension.model_validate(given)
    value = dimension.tried[0]
    for _ in range(200):
        value = dimension.perturbed(value, rng)
        assert dimension.value(dimension.raw(value)) == value
        assert 0 <= dimension.place(value) <= 1
        if dimension.choice is None:
            assert dimension.ends[0] <= value <= dimension.ends[1]
    with pytest.raises(ValueError, match="not in the space"):
        dimension.raw(-1)


def test_perturbed_numbers_are_a_fifth_away_or_drawn_anew(rng):
    dimension = Dimension.model_validate({"loguniform": [1e-6, 1e6]})
    values = np.array([dimension.perturbed(1.0, rng) for _ in range(4000)])
    near = np.isin(values, [0.8, 1.2])
    assert abs(near.mean() - 0.75) < 0.03  # the share in Ray's own scheduler
    assert abs(np.median(np.log10(values[~near]))) < 0.5


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"uniform": [0, 0.5]}, 0.0),
        ({"uniform": [0, 0.5]}, 0.5),
        ({"loguniform": [0.001, 1.0]}, 1.0),
        ({"integer": [1, 4]}, 2),
        ({"integer": [0, 10]}, 0),
        ({"loginteger": [1, 100]}, 1),
        ({"choice": ["a", "b", "c"]}, "a"),
        ({"choice": ["a", "b", "c"]}, "c"),
    ],
)
def test_a_perturbed_value_differs_from_the_old_one(given, value, rng):
    """Also for zero, small whole numbers and ends; only a random draw may repeat the value."""
    dimension = Dimension.model_validate(given)
    changed = [dimension.perturbed(value, rng) for _ in range(2000)]
    assert np.mean([each != value for each in changed]) > 0.75
    assert all(type(each) is type(value) for each in changed)


@pytest.mark.parametrize("given", [{"integer": [1, 4]}, {"integer": [0, 9]}])
def test_whole_numbers_are_drawn_equally_often(given, rng):
    dimension = Dimension.model_validate(given)
    drawn = [dimension._drawn(rng) for _ in range(8000)]
    values, counts = np.unique(drawn, return_counts=True)
    low, high = given["integer"]
    assert values.tolist() == list(range(low, high + 1))
    expected = 8000 / len(values)
    assert ((counts - expected) ** 2 / expected).sum() < 30  # chi-squared, 3 or 9 degrees


def test_the_configs_options_are_the_first_trial_if_in_the_space():
    config = study_config()
    assert search_space.current_values(config, config.tune.space) == {
        "optim.lr": 0.1,
        "net.dropout": 0.1,
        "optim.epochs": 9,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tune.space", '{"optim.rate": {"uniform": [0, 1]}}'], ["optim.rate", "momentum"]),
        (["--tune.space", '{"optim.lr": {"uniform": [1, 20]}}'], ["optim.lr", "20", "10"]),
        (["--tune.space", '{"optim.epochs": {"uniform": [1, 9]}}'], ["optim.epochs", "integer"]),
        (
            ["--tune.space", '{"data.train": {"choice": ["a"]}}'],
            ["data.train", "cannot be searched"],
        ),
        (["--tune.space", "{}"], ["tune.space", "at least 1"]),
        (["--tune.space", '{"optim.lr": {"choice": []}}'], ["optim.lr", "empty"]),
        (["--tune.scheduler.name", "pbt"], ["batch_size", "middle of a run"]),
        (["--tune.sampler", "grid"], ["tune.sampler", "grid"]),
        (["--num-trials", "0"], ["tune.num_trials", "greater"]),
        (["--num-trial", "3"], ["--num-trial", "tune/main.py --help"]),
        (["--resume", "x"], ["resume", "the same command"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--tune.objectives", '["valid_loss", "valid_loss"]'], ["twice"]),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(arguments, words):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_study_extends_a_training_config_and_options_override():
    config = parse(["--num-trials", "7", "--max-minutes", "2", "--optim.epochs", "3"])
    assert (config.tune.num_trials, config.tune.max_minutes, config.optim.epochs) == (7, 2, 3)
    assert config.optim.batch_size == 64  # from train/configs/digits.yaml
    assert config.workers.num == (1, 1)


def test_a_data_file_and_a_target_define_a_study():
    config = parse(["--data.train", "some/table.csv", "--target", "price"])
    assert (config.name, config.study, config.target) == ("table", "table", "price")
    assert "optim.lr" in config.tune.space


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_shipped_studies_are_valid(name):
    config = parse(["--config", f"tune/configs/{name}.yaml"])
    objectives.study_goals(config.tune.objectives, config.tune.pick, METRICS)


# Objectives


def test_objectives_have_the_right_direction():
    names = ("valid_accuracy", "valid_loss", "int8_static.p50_ms@32", "fp32.bytes")
    goals = objectives.study_goals(names, None, METRICS)
    assert [each.maximize for each in goals.objectives] == [True, False, False, False]
    assert goals.variants == ("int8_static", "fp32")
    assert goals.early.name == "valid_accuracy"


@pytest.mark.parametrize(
    "name",
    ["valid_r2", "test_accuracy", "int8_static.test_accuracy", "pruned.bytes", "fp32.p50_ms@3"],
)
def test_an_unknown_objective_is_refused(name):
    with pytest.raises(UserError, match="valid_accuracy"):
        objectives.study_goals([name], None, METRICS)


@pytest.mark.parametrize(
    "rule",
    ["valid_loss", "best", "best valid_r2", "best valid_loss with p50 2", "best valid_loss with 3"],
)
def test_an_invalid_pick_rule_is_refused(rule):
    with pytest.raises(UserError):
        objectives.study_goals(["valid_loss"], rule, METRICS)


def test_a_pick_rule_is_parsed_into_objective_and_bounds():
    rule = "best valid_accuracy with fp32.p50_ms ≤ 2 and fp32.bytes<=1e6"
    pick = objectives.study_goals([], rule, METRICS).pick
    assert pick.best.name == "valid_accuracy"
    assert [str(each) for each in pick.conditions] == ["fp32.p50_ms ≤ 2", "fp32.bytes <= 1e+06"]
    assert pick.conditions[0].holds(2.0)
    assert not pick.conditions[0].holds(2.1)


def test_the_pareto_front_contains_the_undominated_points(rng):
    points = rng.integers(0, 8, (60, 3)).tolist()
    expected = [
        at
        for at, mine in enumerate(points)
        if not any(
            np.all(np.array(other) >= mine) and np.any(np.array(other) > mine) for other in points
        )
    ]
    assert objectives.pareto_front(points) == expected


# The study's files


def test_a_study_is_loaded_as_it_was_saved(tmp_path):
    study = new_study(tmp_path)
    first = study.begin({"optim.lr": 0.1}, {"note": [1]})
    second = study.begin({"optim.lr": 0.2}, {})
    study.report(second, figures(1, 0.5))
    study.report(first, figures(1, 0.25))
    study.report(second, figures(2, 0.125))
    study.end(first, "failed", "it diverged")
    again = Study.load(study.url)
    assert [trial.model_dump() for trial in again.trials] == [
        trial.model_dump() for trial in study.trials
    ]
    assert [(trial.number, each.figures["epoch"]) for trial, each in again.replay()] == [
        (1, 1),
        (0, 1),
        (1, 2),
    ]
    again.report(again.trials[1], figures(3, 0.1))
    assert again.trials[1].reports[-1].at == 3


def test_a_study_keeps_its_space_and_may_have_more_trials(tmp_path):
    study = new_study(tmp_path)
    assert new_study(tmp_path, num_trials=99, max_minutes=3).url == study.url
    with pytest.raises(UserError, match=r"tune\.sampler was gp, is random"):
        new_study(tmp_path, sampler="random")
    other = {"optim.lr": {"loguniform": [0.001, 2]}}
    with pytest.raises(UserError, match=r"study 'digits' exists .*tune\.space\.optim\.lr"):
        new_study(tmp_path, space=other)


def test_a_pick_rule_cannot_use_variants_that_trials_lack(tmp_path):
    study = new_study(tmp_path)
    trial = study.begin({}, {})
    study.report(trial, figures(1, 0.5))
    study.end(trial, "complete")
    with pytest.raises(UserError, match="'fp32', which the trials"):
        new_study(tmp_path, pick="best valid_loss with fp32.bytes <= 5")


def test_the_error_names_a_damaged_or_missing_study(tmp_path):
    study = new_study(tmp_path)
    study.begin({}, {})
    (tmp_path / "studies/s/trials/00000.json").write_text("{")
    with pytest.raises(UserError, match=r"00000\.json"):
        Study.load(study.url)
    with pytest.raises(UserError, match="no study 'other'; existing studies: s"):
        Study.load(str(tmp_path / "studies" / "other"))


def test_a_study_does_not_continue_with_other_records(tmp_path):
    url = str(tmp_path / "studies" / "s")
    Study.open(url, study_config(), METRICS, LOSS, "digest")
    Study.open(url, study_config(), METRICS, LOSS, "digest")
    with pytest.raises(UserError, match="no longer holds the records"):
        Study.open(url, study_config(), METRICS, LOSS, "another")


def test_two_drivers_do_not_share_a_study(tmp_path):
    study = new_study(tmp_path)
    code = """
import sys
from tune.run.study_store import lock_study
with lock_study(sys.argv[1]):
    pass
"""
    command = [sys.executable, "-c", code, study.url]
    with lock_study(study.url):
        held = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    free = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "is being searched by another process" in held.stderr
    assert free.returncode == 0, free.stderr


def test_runs_of_stopped_and_failed_trials_are_removed(tmp_path):
    study = new_study(tmp_path)
    for state in ("complete", "stopped", "failed", "running"):
        trial = study.begin({}, {})
        trial.state = state
        (tmp_path / "studies/s/runs" / trial.run).mkdir(parents=True)
    (tmp_path / "studies/s/runs/refit").mkdir()
    (tmp_path / "studies/s/ray-17").mkdir()
    study.tidy()
    left = {path.name for path in (tmp_path / "studies/s/runs").iterdir()}
    assert left == {"00000", "00003", "refit"}
    assert not (tmp_path / "studies/s/ray-17").exists()


# Sampler


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "gp"])
def test_proposals_do_not_depend_on_restarts(tmp_path, sampler):
    options = {"sampler": sampler}
    if sampler == "nsga2":
        options["objectives"] = ["valid_loss", "valid_accuracy"]
    straight = new_study(tmp_path / "a", **options)
    known = TrialSampler(straight, {"optim.lr": 0.1})
    count = 30 if sampler == "nsga2" else 14
    expected = [play(straight, known).values for _ in range(count)]
    broken = new_study(tmp_path / "b", **options)
    for _ in range(count):
        # Like a driver that is killed after each trial.
        broken = Study.load(broken.url)
        play(broken, TrialSampler(broken, {"optim.lr": 0.1}))
    assert [trial.values for trial in broken.trials] == expected
    assert expected[0]["optim.lr"] == 0.1
    assert len({values["optim.lr"] for values in expected}) > count / 2


@pytest.mark.parametrize(("sampler", "count"), [("tpe", 40), ("gp", 20)])
def test_the_sampler_finds_better_regions(tmp_path, sampler, count):
    study = new_study(tmp_path, sampler=sampler)
    sampler = TrialSampler(study, {})

    def losses(values, epoch):
        return abs(np.log10(values["optim.lr"]) + 2) + values["net.dropout"]

    for _ in range(count):
        play(study, sampler, losses=losses, epochs=1)
    early, late = (
        np.mean([losses(trial.values, 1) for trial in trials])
        for trials in (study.trials[:8], study.trials[-8:])
    )
    assert late < early / 2


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_the_sampler_avoids_failed_trials_and_tolerates_nan(tmp_path, sampler):
    study = new_study(tmp_path, sampler=sampler)
    sampler = TrialSampler(study, {})
    for _ in range(30):
        values, notes = sampler.propose()
        trial = study.begin(values, notes)
        if values["optim.lr"] > 0.03:
            study.report(trial, figures(1, float("nan")))
            study.end(trial, "failed", "it diverged")
        else:
            study.report(trial, figures(1, 0.1 + values["net.dropout"]))
            study.end(trial, "complete")
    assert sum(trial.state == "failed" for trial in study.trials[-10:]) <= 3
    TrialSampler(Study.load(study.url), {}).propose()


def fail_beyond(study, cliff, count=32):
    """Add trials that get better with the rate and fail above `cliff`; count late failures."""
    sampler = TrialSampler(study, {})
    for _ in range(count):
        values, notes = sampler.propose()
        trial = study.begin(values, notes)
        if values["optim.lr"] > cliff:
            study.end(trial, "failed", "it diverged")
        else:
            study.report(trial, figures(1, 1 - np.log10(values["optim.lr"])))
            study.end(trial, "complete")
    return sum(trial.state == "failed" for trial in study.trials[-count // 2 :])


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
@pytest.mark.parametrize("objectives", [["valid_loss"], ["valid_loss", "valid_accuracy"]])
def test_searches_learn_where_trials_fail(tmp_path, sampler, objectives):
    """Also with several objectives, where a failed trial counts as the worst in each."""
    failed = [
        fail_beyond(
            new_study(tmp_path / str(seed), sampler=sampler, objectives=objectives, seed=seed), 0.03
        )
        for seed in range(3)
    ]
    assert np.mean(failed) <= 6.5


@pytest.mark.parametrize(
    ("options", "scheduling"),
    [
        ({}, "asha"),
        ({"objectives": ["valid_loss"]}, "asha"),
        ({"objectives": ["int8_static.valid_accuracy"]}, "asha"),
        ({"objectives": ["fp32.bytes"]}, "none"),
        ({"objectives": ["fp32.p50_ms@32"]}, "none"),
        ({"objectives": ["valid_loss", "fp32.bytes"]}, "none"),
        ({"pick": "best valid_accuracy with fp32.bytes <= 1000"}, "asha"),
        ({"pick": "best fp32.bytes with valid_accuracy >= 0.9"}, "none"),
    ],
)
def test_trials_stop_early_only_if_a_metric_is_optimized(options, scheduling):
    """A metric that is only a bound would stop the small nets that the rule favours."""
    assert study_config(**options).tune.scheduling == scheduling


def test_a_scheduler_without_a_metric_is_refused():
    words = r"asha compares trials by a validation metric, but fp32\.bytes is not one"
    with pytest.raises(UserError, match=words):
        study_config(objectives=["fp32.bytes"], scheduler={"name": "asha"})


def test_a_trial_stopped_with_a_nan_loss_counts_as_failed(tmp_path):
    """With several objectives, a trial that was stopped early with a finite loss is ignored."""
    study = new_study(tmp_path, objectives=["valid_loss", "fp32.bytes"], sampler="gp")
    for loss, size in ((0.5, 10), (0.9, 20), (0.7, None), (float("nan"), None)):
        rest = {"net.dropout": 0.1, "net.widths": [16, 32], "optim.epochs": 4}
        trial = study.begin({"optim.lr": 0.01, **rest}, {})
        study.report(trial, figures(1, loss))
        trial.served = {"fp32": {**served()["fp32"], "bytes": size, "valid_loss": loss}}
        study.end(trial, "complete" if size else "stopped")
    known = TrialSampler(study, {})._known_study().get_trials()
    assert [trial.values for trial in known] == [[0.5, 10], [0.9, 20], None, [0.9, 20]]


def test_a_failed_trial_counts_as_the_worst_of_all(tmp_path):
    """Including trials that finish later, so that a restart gives the same values."""
    study = new_study(tmp_path, sampler="gp", objectives=["valid_loss"])
    sampler = TrialSampler(study, {})
    for number, loss in enumerate([0.5, None, 0.2, 0.9]):
        rest = {"net.dropout": 0.1, "net.widths": [16, 32], "optim.epochs": 4}
        trial = study.begin({"optim.lr": 0.01 * (number + 1), **rest}, {})
        if loss is None:
            study.end(trial, "failed", "it diverged")
        else:
            study.report(trial, figures(1, loss))
            study.end(trial, "complete")
    values = [trial.values for trial in sampler._known_study().get_trials(deepcopy=False)]
    assert values == [[0.5], [0.9], [0.2], [0.9]]


# Scheduler


class Ray:
    """Stand-in for the trials that Ray's schedulers receive."""

    def __init__(self, number):
        self.trial_id = f"{number:05d}"


def result(epoch, loss):
    """Return the report of a trial as Ray flattens it."""
    flat = {f"figures/{name}": value for name, value in figures(epoch, loss).items()}
    return {"epoch": epoch, "value": -loss, **flat}


def terms(study, most=9):
    return SchedulerContext(study, LOSS, lambda trial: most, most, seed=0)


RULES = {
    "asha": lambda: AsyncHyperBandScheduler("epoch", "value", "max", 9, 1, 3, 1, False),
    "hyperband": lambda: AsyncHyperBandScheduler("epoch", "value", "max", 9, 1, 3, 3, False),
    "median": lambda: MedianStoppingRule("epoch", "value", "max", 1, min_time_slice=np.inf),
}


def simulate(study, judge, losses, *, restart=lambda study, judge: (study, judge)):
    """Let trials report in turns, two at a time, until all have ended; return their epochs."""
    waiting = list(range(len(losses)))
    live = []
    while waiting or live:
        while waiting and len(live) < 2:
            number = waiting.pop(0)
            if number >= len(study.trials):
                study.begin({}, {})
            judge.on_trial_add(None, Ray(number))
            live.append(number)
        number = live.pop(0)
        trial = study.trials[number]
        epoch = trial.epoch + 1
        loss = losses[number] / epoch**0.5
        decision = judge.on_trial_result(None, Ray(number), result(epoch, loss))
        study.report(trial, figures(epoch, loss))
        if decision == "STOP" or epoch == 9:
            study.end(trial, "complete" if epoch == 9 else "stopped")
            judge.on_trial_complete(None, Ray(number), result(epoch, loss))
        else:
            live.append(number)
        study, judge = restart(study, judge)
    return [trial.epoch for trial in study.trials]


@pytest.mark.parametrize("name", RULES)
def test_scheduler_decisions_do_not_depend_on_restarts(tmp_path, rng, name):
    losses = rng.random(24)
    options = {"scheduler": {"name": name}}
    study = new_study(tmp_path / "a", **options)
    straight = simulate(study, create_scheduler(study.config.tune, terms(study), dict), losses)

    def restart(study, judge):
        study = Study.load(study.url)
        again = create_scheduler(study.config.tune, terms(study), dict)
        for trial in study.in_state("running"):
            again.on_trial_add(None, Ray(trial.number))
        return study, again

    study = new_study(tmp_path / "b", **options)
    judge = create_scheduler(study.config.tune, terms(study), dict)
    assert simulate(study, judge, losses, restart=restart) == straight
    assert min(straight) < 9 == max(straight)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_trials_stop_where_rays_own_scheduler_stops_them(tmp_path, rng, name):
    losses = rng.random(24)
    study = new_study(tmp_path, scheduler={"name": name})
    mine = simulate(study, create_scheduler(study.config.tune, terms(study), dict), losses)
    own = RULES[name]()
    study = new_study(tmp_path / "own")
    known = {}

    class Bare:
        def on_trial_add(self, controller, trial):
            known[trial.trial_id] = trial
            own.on_trial_add(None, trial)

        def on_trial_result(self, controller, trial, result):
            if result["epoch"] == 9:
                return "CONTINUE"
            return own.on_trial_result(None, known[trial.trial_id], result)

        def on_trial_complete(self, controller, trial, result):
            own.on_trial_complete(None, known[trial.trial_id], result)

    assert simulate(study, Bare(), losses) == mine


@pytest.mark.parametrize("name", [*RULES, "none"])
def test_a_trial_with_a_nan_metric_is_stopped(tmp_path, name):
    """The other trials are judged as if it did not exist."""
    study = new_study(tmp_path / "a", scheduler={"name": name})
    judge = create_scheduler(study.config.tune, terms(study), dict)
    assert simulate(study, judge, [float("nan")] * 4) == [1] * 4
    losses = [0.5, float("nan"), 0.4, float("nan"), 0.6, 0.7, 0.3, float("nan")]
    study = new_study(tmp_path / "b", scheduler={"name": name})
    judge = create_scheduler(study.config.tune, terms(study), dict)
    ended = simulate(study, judge, losses)
    assert [ended[number] for number in (1, 3, 7)] == [1] * 3
    assert ended[6] == 9
    # The next driver stops such a trial if the last driver died before stopping it.
    study.report(study.begin({}, {}), figures(1, float("nan")))
    create_scheduler(study.config.tune, terms(study), dict)
    assert study.trials[-1].state == "stopped"


def test_the_next_driver_stops_a_trial_that_was_told_to_stop(tmp_path):
    study = new_study(tmp_path, scheduler={"name": "asha"})
    for loss in (0.1, 0.2, 0.9):
        study.report(study.begin({}, {}), figures(1, loss))
    ReplayedScheduler(RULES["asha"](), terms(study))
    assert [trial.state for trial in study.trials] == ["running", "stopped", "stopped"]
    states = [trial.state for trial in Study.load(study.url).trials]
    assert states == ["running", "stopped", "stopped"]


def test_a_repeated_epoch_is_not_judged_again(tmp_path):
    study = new_study(tmp_path, scheduler={"name": "asha"})
    judge = create_scheduler(study.config.tune, terms(study), dict)
    for number, loss in enumerate((0.1, 0.9)):
        study.begin({}, {})
        judge.on_trial_add(None, Ray(number))
        if number == 0:
            judge.on_trial_result(None, Ray(0), result(1, loss))
            study.report(study.trials[0], figures(1, loss))
    assert judge.on_trial_result(None, Ray(0), result(1, 0.95)) == "CONTINUE"
    assert judge.on_trial_result(None, Ray(1), result(1, 0.9)) == "STOP"


def test_several_objectives_disable_early_stopping_by_default():
    one, two = (
        TuneConfig(space=SPACE, objectives=names) for names in ((), ("valid_loss", "fp32.bytes"))
    )
    assert (one.scheduling, two.scheduling) == ("asha", "none")
    named = TuneConfig(
        space=SPACE, objectives=two.objectives, scheduler=SchedulerConfig(name="median")
    )
    assert named.scheduling == "median"


# Winner and report


def served(verdict="accepted", p50_ms=1.0):
    return {"fp32": {"verdict": verdict, "p50_ms": p50_ms, "valid_loss": 0.5}}


def finished(folder, **tune):
    study = new_study(folder, objectives=["valid_loss"], **tune)
    sampler = TrialSampler(study, {})
    for _ in range(8):
        play(study, sampler)
    return study


def test_the_best_epoch_of_the_best_complete_trial_wins(tmp_path):
    study = finished(tmp_path)
    best = min(
        study.in_state("complete"), key=lambda trial: min(row["valid_loss"] for row in trial.rows)
    )
    assert select_winner(study) is best
    assert study.measured(best) == {"valid_loss": min(row["valid_loss"] for row in best.rows)}


def test_a_nan_loss_does_not_win(tmp_path):
    study = new_study(tmp_path, objectives=["valid_loss"])
    for loss in (float("nan"), 0.5, 0.4):
        trial = study.begin({}, {})
        study.report(trial, figures(1, loss))
        study.end(trial, "complete")
    study.report(study.trials[1], figures(2, float("nan")))
    assert select_winner(study).number == 2
    assert study.measured(study.trials[1]) == {"valid_loss": 0.5}


def test_a_trial_out_of_bounds_or_refused_by_the_gate_loses(tmp_path):
    study = new_study(tmp_path, pick="best valid_loss with fp32.p50_ms <= 2")
    for loss, verdict, p50_ms in [
        (0.1, "refused", 1),
        (0.2, "accepted", 3),
        (0.3, "accepted", 2),
        (0.4, "accepted", 1),
    ]:
        trial = study.begin({}, {})
        study.report(trial, figures(1, loss))
        trial.served = served(verdict, p50_ms)
        study.end(trial, "complete")
    assert select_winner(study).number == 2
    study.trials[2].served = study.trials[3].served = served(p50_ms=5)
    with pytest.raises(CommandFailed, match=r"fp32\.p50_ms <= 2: .* from 3 to 5"):
        select_winner(study)


def remade(verdict="accepted", p50_ms=1.0, skipped=()):
    """Return the parts of a bundle's manifest that are compared with the rule."""
    profile = [
        Timing(engine="e", threads=1, batch_size=size, p50_ms=p50_ms, low_ms=0, high_ms=9)
        for size in BATCH_SIZES
    ]
    variant = Variant.model_construct(
        engine="e", verdict=verdict, size_bytes=10, metrics={}, profile=profile
    )
    return Manifest.model_construct(
        variants={} if skipped else {"fp32": variant},
        skipped=dict(skipped),
        metrics={"valid_accuracy": 0.5},
    )


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (remade(), None),
        (remade(p50_ms=2.5), "fp32.p50_ms is now 2.5, was 1, and must satisfy fp32.p50_ms <= 2"),
        (remade(verdict="refused"), "fp32 is now refused by the gate"),
        (remade(skipped=[("fp32", "no room")]), "fp32 could not be made: no room"),
    ],
)
def test_a_retrained_winner_must_satisfy_the_pick_rule(tmp_path, manifest, words):
    study = new_study(tmp_path, pick="best valid_loss with fp32.p50_ms <= 2")
    trial = study.begin({}, {})
    study.report(trial, figures(1, 0.4))
    trial.served = served(p50_ms=1.0)
    study.end(trial, "complete")
    assert broken_rule(study, select_winner(study), manifest) == words


def test_without_a_complete_trial_the_error_says_what_to_do(tmp_path):
    study = new_study(tmp_path)
    trial = study.begin({}, {})
    with pytest.raises(CommandFailed, match="--max-minutes"):
        select_winner(study)
    study.end(trial, "failed", "the loss is no longer finite")
    with pytest.raises(CommandFailed, match=r"all 1 trials failed.*no longer finite"):
        select_winner(study)


def test_a_report_can_be_written_for_a_running_study(tmp_path):
    study = finished(tmp_path, pick="best valid_loss with valid_accuracy >= 0")
    running = study.begin(study.trials[0].values, {})
    study.report(running, figures(1, 0.5))
    failed = study.begin(study.trials[1].values, {})
    study.end(failed, "failed", "the loss is no longer | finite")
    place = report.write_report(Study.load(study.url))
    pictures = {path.name for path in (tmp_path / "studies/s/report").glob("*.png")}
    assert pictures == {"history.png", "rungs.png", "parallel.png", "importance.png", "pareto.png"}
    for name in pictures:
        assert np.array(Image.open(f"{place}/{name}").convert("L")).std() > 5
    lines = (tmp_path / "studies/s/report/report.md").read_text().splitlines()
    assert lines[6].startswith(f"| {select_winner(study).number} | **winner** |")
    assert "trial 9: the loss is no longer | finite" in lines


def test_the_report_command_finds_the_only_study(tmp_path):
    finished(tmp_path)
    command = [sys.executable, "-m", "tune.report", "--storage.path", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["study"], said["num_trials"]) == ("s", 8)
    assert "**winner**" in done.stderr


def test_a_refit_ends_where_its_trial_was_best_or_stopped():
    rows = [{"epoch": epoch, "valid_loss": loss} for epoch, loss in ((1, 0.5), (2, 0.3), (3, 0.4))]
    loss = Metric("valid_loss", "lower")
    for stop, after in (
        ({}, None),
        ({"after": 5}, 5),
        ({"metric": "valid_loss", "patience": 1}, 2),
        ({"metric": "valid_loss", "after": 5}, 2),
    ):
        refit = refit_config(make_config(stop=stop), rows, loss)
        assert (refit.stop.after, refit.stop.metric) == (after, None), stop
        assert refit.data.train_on_valid


def test_a_trial_computes_on_the_cpus_that_it_reserved(digits, tmp_path, monkeypatch):
    """With all cores, trials that run at the same time would slow each other down."""
    counts = []
    monkeypatch.setattr(trainable.torch, "set_num_threads", counts.append)
    config = make_config(workers={"num": 1, "cpus": 3}, optim={"epochs": 1, "batch_size": 64})
    events = trainable._here(config, digits, Run.start(str(tmp_path / "run"), config))
    assert next(events)["epoch"] == 1
    assert counts == [3]


def test_the_table_shows_best_running_and_finished_trials(tmp_path):
    from rich.console import Console

    study = finished(tmp_path, num_trials=12)
    study.begin(study.trials[0].values, {})
    with (tmp_path / "out").open("w") as file:
        console = Console(file=file, width=200)
        console.print(StudyDisplay(study, 2, console).table())
    text = (tmp_path / "out").read_text()
    lines = text.splitlines()
    assert lines[1].split()[:2] == [str(select_winner(study).number), "best"]
    assert any("running" in line for line in lines)
    assert "8 of 12 trials" in text
