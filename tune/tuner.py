"""tune(config) -> result: search, pick the winner, and make of it what will be served."""

import secrets
import sys
import time
from typing import Any

import yaml

from cluster import storage
from cluster.errors import UserError
from train import fit
from train.bundle import registry
from train.config import LAST, Config
from train.data import shards
from train.data.shards import Shards
from train.loop import trainer
from train.loop.figures import kept
from train.loop.run import Run
from tune import objectives, report, search, space
from tune.commandline import training
from tune.config import StudyConfig
from tune.display import Display
from tune.pick import winner
from tune.sampler import Sampler
from tune.search import Search
from tune.study import BEST, RESULT, Study, Trial, alone, location
from tune.tracking import Tracking

REFIT = "refit"
REFITTED = {"data.train_on_valid": True, "checkpoint.best": LAST, "stop.metric": None}


def tune(config: StudyConfig, root: str) -> dict[str, Any]:
    """Search, or go on with a search; return what the command prints.

    root: the storage path. Raises UserError before any trial starts; Failed when no trial is fit
    to win.
    """
    started = time.perf_counter()
    base, data = fit.prepare(training(config))
    metric_names = data.task.target.metric_names
    wanted = objectives.goals(config.tune.objectives, config.tune.pick, metric_names).variants
    # What trials are measured by, the winner has too.
    variants = list(dict.fromkeys((*base.compress.variants, *wanted)))
    base = space.with_values(base, {"compress.variants": variants})
    for name, dimension in config.tune.space.items():
        for value in dimension.tried:
            fit.check(space.with_values(base, {name: value}), data)
    choice = base.checkpoint.best or f"valid_{data.task.metric}"
    parallel = search.concurrency(config)
    if base.registry.enabled:
        registry.check(root, base.registry.metric)
    url = location(root, config.study)
    with alone(url):
        study = Study.open(url, config, metric_names, choice, data.summary["digest"])
        if (result := _result(study)) is not None:
            print(
                f"study {study.name} has its {len(study.trials)} trials; --num-trials with more "
                "goes on, another --tune.study begins anew",
                file=sys.stderr,
            )
            return result
        plan = Search(study, base, parallel)
        judge = search.judge(plan)  # first, as it ends trials
        first = space.present(base, config.tune.space) if config.tune.start else {}
        sampler = Sampler(study, first)
        with Tracking(study, root) as tracking:
            with Display(study, parallel) as display:
                search.run(plan, sampler, judge, [display, tracking])
            study.tidy()
            pictures = report.write(study, tracking.add)
            result = _finish(plan, winner(study), root, tracking, started)
            result["report"] = pictures
        study.write(RESULT, {"of": _key(study), "result": result})
        return result


def _finish(
    plan: Search, trial: Trial, root: str, tracking: Tracking, started: float
) -> dict[str, Any]:
    """Make the bundle of the winner, register it, and write its config."""
    study, refit = plan.study, plan.study.config.tune.refit
    measured = study.measured(trial)
    shown = ", ".join(f"{name} {value:.6g}" for name, value in measured.items())
    print(f"trial {trial.number} wins: {shown}", file=sys.stderr)
    best = plan.of(trial)
    if refit:
        best = space.with_values(best, REFITTED)
    best_url = storage.join(study.url, BEST)
    fs, path = storage.filesystem(best_url)
    with fs.open(path, "w") as file:
        file.write(f"# Trial {trial.number} of study {study.name}: {shown}.\n")
        if trial.takeovers:
            file.write("# Its options changed while it ran, so these alone give another net.\n")
        options = best.model_dump(mode="json", exclude_unset=True)
        yaml.safe_dump(options, file, sort_keys=False, allow_unicode=True)

    begun = time.perf_counter() - trial.seconds
    data = shards.prepare(best, root)
    run = _refitted(study, best, data) if refit else Run.open(study.run_url(trial.run))
    lineage = {
        "study": study.name,
        "trial": trial.number,
        "num_trials": len(study.trials),
        "objectives": measured,
        "takeovers": [{"epoch": each.epoch, "donor": each.donor} for each in trial.takeovers],
    }
    name = f"{best.name}-{study.name}-{trial.name}-{secrets.token_hex(2)}"
    bundle = fit.bundle(best, data, run, begun, name=name, lineage=lineage)
    result = registry.summary(bundle)
    if best.registry.enabled:
        metric = best.registry.metric or f"valid_{bundle.task.metric}"
        # The refitted net has seen the records that it would be judged by.
        figure = kept(trial.rows, study.choice)[metric] if refit else None
        result |= tracking.publish(bundle, metric, figure)
    return result | {
        "study": study.name,
        "num_trials": len(study.trials),
        "trial": trial.number,
        "objectives": measured,
        "best_config": best_url,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _refitted(study: Study, config: Config, data: Shards) -> Run:
    """Train on training and validation records together, or go on with it."""
    url = study.run_url(REFIT)
    try:
        run = Run.resume(url, config)
    except UserError:  # none, or of another winner
        fs, path = storage.filesystem(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)
        run = Run.start(url, config)
    trainer.train(config, run, data)
    return run


def _result(study: Study) -> dict[str, Any] | None:
    """What a finished study ended in, if nothing of it would be different now."""
    found = study.read(RESULT)
    unfinished = study.in_state("running") or len(study.trials) < study.config.tune.num_trials
    if unfinished or found is None or found["of"] != _key(study):
        return None
    return dict(found["result"])


def _key(study: Study) -> dict[str, Any]:
    """What decides a result, of a study that is finished."""
    config = study.config
    return {
        "num_trials": len(study.trials),
        "pick": config.tune.pick,
        "refit": config.tune.refit,
        "registered": config.registry.enabled,
    }
