"""Selection of the winner: the study's rule, applied to the figures of its trials."""

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
            raise CommandFailed(
                f"all {len(failed)} trials failed; error of the last: {failed[-1].cause}"
            )
        option = "--max-minutes" if study.in_state("running") else "--num-trials"
        raise CommandFailed(
            f"none of {len(study.trials)} trials is complete yet; to continue, run the same "
            f"command with a larger {option}."
        )
    figures = {trial.number: study.measured(trial) for trial in complete}
    accepted = [
        trial
        for trial in complete
        if not _refused(trial) and math.isfinite(figures[trial.number][pick.best.name])
    ]
    if not accepted:
        raise CommandFailed(
            f"none of {len(complete)} complete trials has finite figures and variants that the "
            f"gate accepts; to see why, run: python -m tune.report {study.name}"
        )
    fit_to_win = [
        trial
        for trial in accepted
        if all(each.holds(figures[trial.number][each.objective.name]) for each in pick.conditions)
    ]
    if not fit_to_win:
        bounds = " and ".join(str(each) for each in pick.conditions)
        ranges = "; ".join(
            f"{name} ranges from {min(values):g} to {max(values):g}"
            for name in dict.fromkeys(each.objective.name for each in pick.conditions)
            for values in [[figures[trial.number][name] for trial in accepted]]
        )
        raise CommandFailed(f"no trial satisfies {bounds}: {ranges}. Give another --tune.pick.")
    # The earliest trial wins a tie.
    return max(
        fit_to_win,
        key=lambda trial: (
            pick.best.signed(figures[trial.number][pick.best.name]),
            -trial.number,
        ),
    )


def broken_rule(study: Study, trial: Trial, manifest: Manifest) -> str | None:
    """Return how the winner's bundle breaks the rule by which the trial won; None if it does not.

    The bundle's variants were compressed and measured again. After a refit, metrics of the
    validation split are not compared, because the model was trained on that split.
    """
    measured, pick = study.measured(trial), study.goals.pick
    served = {name: variant_metrics(each) for name, each in manifest.variants.items()}
    broken = []
    for name in dict.fromkeys(each.variant for each in pick.objectives if each.variant):
        if name not in served:
            broken.append(
                f"{name} could not be made: {manifest.skipped.get(name, 'not requested')}"
            )
        elif served[name]["verdict"] != "accepted":
            broken.append(f"{name} is now {served[name]['verdict']} by the gate")
    for each in pick.conditions:
        objective = each.objective
        if objective.variant not in (None, *served):
            continue
        if objective.of_task and study.config.tune.refit:
            continue
        value = objective.of(manifest.metrics, served)
        if not each.holds(value):
            before = measured[objective.name]
            broken.append(
                f"{objective.name} is now {value:.6g}, was {before:.6g}, and must satisfy {each}"
            )
    return "; ".join(broken) or None


def _refused(trial: Trial) -> bool:
    return any(figures["verdict"] != "accepted" for figures in trial.served.values())
