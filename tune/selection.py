"""Which trial wins: the study's rule, applied to what its trials measured."""

import math

from cluster.errors import CommandFailed
from train.bundle.manifest import Manifest
from tune.objectives import variant_metrics
from tune.run.study_store import Study
from tune.run.trial_record import Trial


def select_winner(study: Study) -> Trial:
    """Return the trial that wins by the study's rule. Raises CommandFailed if none does."""
    complete, pick = study.in_state("complete"), study.goals.pick
    if not complete:
        failed = study.in_state("failed")
        if failed and len(failed) == len(study.trials):
            raise CommandFailed(f"all {len(failed)} trials failed; the last: {failed[-1].cause}")
        more = "the same command with a larger --max-minutes goes on"
        if not study.in_state("running"):
            more = "--num-trials with more goes on"
        raise CommandFailed(f"none of {len(study.trials)} trials is complete yet; {more}.")
    figures = {trial.number: study.measured(trial) for trial in complete}
    accepted = [
        trial
        for trial in complete
        if not _refused(trial) and math.isfinite(figures[trial.number][pick.best.name])
    ]
    if not accepted:
        raise CommandFailed(
            f"of {len(complete)} complete trials none has figures that are numbers, and variants "
            f"that the gate accepts; look at them with: python -m tune.report {study.name}"
        )
    fit_to_win = [
        trial
        for trial in accepted
        if all(each.holds(figures[trial.number][each.objective.name]) for each in pick.conditions)
    ]
    if not fit_to_win:
        bounds = " and ".join(str(each) for each in pick.conditions)
        ranges = "; ".join(
            f"{name} is from {min(values):g} to {max(values):g}"
            for name in dict.fromkeys(each.objective.name for each in pick.conditions)
            for values in [[figures[trial.number][name] for trial in accepted]]
        )
        raise CommandFailed(f"no trial has {bounds}: {ranges}. Give another --tune.pick.")
    # Of equal ones the one that was found first.
    return max(
        fit_to_win,
        key=lambda trial: (
            pick.best.signed(figures[trial.number][pick.best.name]),
            -trial.number,
        ),
    )


def broken_rule(study: Study, trial: Trial, manifest: Manifest) -> str | None:
    """Say where a bundle that was made of the winner breaks the rule by which it won; else None.

    The bundle's variants were compressed and measured again. After a refit, metrics of the
    validation split are not compared, as the net has learned from it.
    """
    measured, pick = study.measured(trial), study.goals.pick
    served = {name: variant_metrics(each) for name, each in manifest.variants.items()}
    broken = []
    for name in dict.fromkeys(each.variant for each in pick.objectives if each.variant):
        if name not in served:
            broken.append(
                f"{name} could not be made: {manifest.skipped.get(name, 'not asked for')}"
            )
        elif served[name]["verdict"] != "accepted":
            broken.append(f"{name} is {served[name]['verdict']} by the gate now")
    for each in pick.conditions:
        objective = each.objective
        if objective.variant not in (None, *served):
            continue
        if objective.of_task and study.config.tune.refit:
            continue
        value = objective.of(manifest.metrics, served)
        if not each.holds(value):
            before = measured[objective.name]
            broken.append(f"it has {value:.6g} where {each} was asked for, and had {before:.6g}")
    return "; ".join(broken) or None


def _refused(trial: Trial) -> bool:
    return any(figures["verdict"] != "accepted" for figures in trial.served.values())
