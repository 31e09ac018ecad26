"""tune(config) -> result: search, pick the winner, and build the bundle to serve."""

import functools
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import yaml

from cluster import connect, storage
from cluster.errors import UserError
from train.bundle import publishing
from train.bundling import build_bundle
from train.compress.scoring import validation_score
from train.config import LAST, Config
from train.data import dataset
from train.data.dataset import EncodedDataset
from train.distributed import launcher
from train.loop.run_directory import Run
from train.metrics import Metric, best_epoch
from train.pretrained.backbone import attach_backbone
from train.training import check_against_data, prepare_run, print_next_steps
from tune import objectives, report, search_space
from tune.cli import check_study, training_config
from tune.config import StudyConfig
from tune.reports.mlflow_tracking import MLflowTracking
from tune.reports.progress import StudyDisplay
from tune.run import runner
from tune.run.runner import SearchContext
from tune.run.sampler import TrialSampler
from tune.run.study_store import BEST, RESULT, Study, lock_study, study_location
from tune.run.trial_record import Trial
from tune.selection import broken_rule, select_winner

REFIT = "refit"
REFITTED = {
    "data.train_on_valid": True,
    "checkpoint.metric": LAST,
    "stop.metric": None,
}


class StudyResult(TypedDict, total=False):
    """Result of a study: what training returns for the winner, and facts about the search.

    version, alias and uri are None without a registry. bundle and best_config are paths or URLs.
    metrics and objectives hold values by name, variants the metrics of each variant. trial is the
    winner's number; report lists the files of the study's report.
    """

    model: str
    version: int | None
    alias: str | None
    uri: str | None
    bundle: str
    metrics: dict[str, float]
    simple_models: dict[str, dict[str, float]]
    comparison: str
    variants: dict[str, dict[str, Any]]
    default_variant: str
    seconds: float
    study: str
    num_trials: int
    trial: int
    objectives: dict[str, float]
    best_config: str
    report: Any


def tune(config: StudyConfig) -> StudyResult:
    """Search training options, train on the best ones, register the winner; return the result.

        tune(StudyConfig(target="price", data={"train": "houses.csv"},
                         tune={"space": {"optim.lr": {"loguniform": [0.001, 0.1]}}}))

    A study that was interrupted continues. Ray starts on this machine unless it runs already or
    RAY_ADDRESS names a cluster. Raises UserError, before any trial starts, for wrong input;
    CommandFailed if no trial can win.
    """
    started = time.perf_counter()
    root = config.storage.root
    check_study(config)
    connect.connect(num_cpus=config.workers.all_cpus, metrics=False, logs=False)
    completed, data = prepare_run(training_config(config))
    base = completed.config
    known = data.task.known_metrics
    wanted = objectives.study_goals(config.tune.objectives, config.tune.pick, known).variants
    # The winner's bundle also needs the variants by which trials are measured.
    variants = list(dict.fromkeys((*base.compress.variants, *wanted)))
    base = search_space.with_values(base, {"compress.variants": variants})
    for name, dimension in config.tune.space.items():
        for value in dimension.tried:
            check_against_data(search_space.with_values(base, {name: value}), data)
    choice = data.task.find_metric(base.epoch_metric)
    parallel = runner.max_concurrent(config)
    if base.registry.enabled:
        publishing.check_publishable(root, base.registry.metric)
    url = study_location(root, config.study)
    with lock_study(url):
        study = Study.open(url, config, known, choice, data.summary["digest"])
        if (result := _result(study)) is not None:
            print(
                f"study {study.name} already has its {len(study.trials)} trials; a larger "
                "--num-trials continues it, another --tune.study starts a new one",
                file=sys.stderr,
            )
            return cast(StudyResult, result)
        plan = SearchContext(study, base, parallel)
        judge = runner.build_scheduler(plan)  # first, because it may end stored trials
        first = search_space.current_values(base, config.tune.space) if config.tune.start else {}
        sampler = TrialSampler(study, first)
        with MLflowTracking(study, root) as tracking:
            with StudyDisplay(study, parallel) as display:
                runner.run_search(plan, sampler, judge, [display, tracking])
            study.tidy()
            pictures = report.write_report(study, tracking.add)
            result = _finish(plan, select_winner(study), root, tracking, started)
            result["report"] = pictures
        study.write(RESULT, {"of": _key(study), "result": result})
        return cast(StudyResult, result)


def _finish(
    plan: SearchContext, trial: Trial, root: str, tracking: MLflowTracking, started: float
) -> dict[str, Any]:
    """Build the winner's bundle, register it, and write the winner's config."""
    study, refit = plan.study, plan.study.config.tune.refit
    measured = study.measured(trial)
    shown = ", ".join(f"{name} {value:.6g}" for name, value in measured.items())
    print(f"trial {trial.number} wins: {shown}", file=sys.stderr)
    best = plan.of(trial)
    if best.stop.folds:  # trials ran without them
        best = search_space.with_values(best, {"stop.folds": 0})
    if refit:
        best = refit_config(best, trial.rows, study.choice)
    best_url = storage.join_path(study.url, BEST)
    fs, path = storage.filesystem(best_url)
    with fs.open(path, "w") as file:
        file.write(f"# Trial {trial.number} of study {study.name}: {shown}.\n")
        if trial.takeovers:
            file.write("# Its options changed during training: these alone give another model.\n")
        options = best.model_dump(mode="json", exclude_unset=True)
        yaml.safe_dump(options, file, sort_keys=False, allow_unicode=True)

    begun = time.perf_counter() - trial.seconds
    data = attach_backbone(best, dataset.prepare_dataset(best, root))
    run = _refitted(study, best, data) if refit else Run.open(study.run_url(trial.run))
    lineage = {
        "study": study.name,
        "trial": trial.number,
        "num_trials": len(study.trials),
        "objectives": measured,
        "takeovers": [{"epoch": each.epoch, "donor": each.donor} for each in trial.takeovers],
    }
    name = f"{best.name}-{study.name}-{trial.name}-{secrets.token_hex(2)}"
    bundle = build_bundle(best, data, run, begun, name=name, lineage=lineage)
    result = publishing.bundle_summary(bundle)
    if best.registry.enabled:
        metric = best.registry.metric or f"valid_{bundle.task.metric}"
        # The refitted model cannot be scored on validation records, which it was trained on.
        figure = best_epoch(trial.rows, study.choice)[metric] if refit else None
        score = functools.partial(validation_score, best)
        broken = broken_rule(study, trial, bundle.manifest)
        result |= tracking.publish(bundle, metric, figure, score, candidate=broken)
    print_next_steps(bundle, result["uri"])
    return result | {
        "study": study.name,
        "num_trials": len(study.trials),
        "trial": trial.number,
        "objectives": measured,
        "best_config": best_url,
        "seconds": round(time.perf_counter() - started, 3),
    }


def refit_config(config: Config, rows: Sequence[Mapping[str, float]], choice: Metric) -> Config:
    """Return a winner's options for training on training and validation records together.

    rows: the trial's figures by epoch. choice: the metric by which it kept its weights.
    """
    if config.stop.metric is None:
        return search_space.with_values(config, REFITTED)
    # Without validation records nothing else would stop the run where the trial was best.
    last = best_epoch(rows, choice)["epoch"]
    return search_space.with_values(config, {**REFITTED, "stop.after": last})


def _refitted(study: Study, config: Config, data: EncodedDataset) -> Run:
    """Train on training and validation records together, or resume such a run."""
    url = study.run_url(REFIT)
    try:
        run = Run.resume(url, config)
    except UserError:  # there is no such run, or it is of another winner
        storage.remove(url)
        run = Run.start(url, config)
    launcher.train(config, run, data)
    return run


def _result(study: Study) -> dict[str, Any] | None:
    """Return the stored result of a finished study; None if it is missing or out of date."""
    found = study.read(RESULT)
    unfinished = study.in_state("running") or len(study.trials) < study.config.tune.num_trials
    if unfinished or found is None or found["of"] != _key(study):
        return None
    return dict(found["result"])


def _key(study: Study) -> dict[str, Any]:
    """Return the values that determine the result of a finished study."""
    config = study.config
    return {
        "num_trials": len(study.trials),
        "pick": config.tune.pick,
        "refit": config.tune.refit,
        "registered": config.registry.enabled,
    }
