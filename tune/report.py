"""python -m tune.report [STUDY] [--storage PATH]: the table and plots of a study."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cluster import storage
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import CommandFailed, UserError
from tune.objectives import pareto_front
from tune.reports import plots
from tune.reports.progress import format_duration, format_value
from tune.run.study_store import REPORT, Study, study_location
from tune.run.trial_record import Trial
from tune.selection import select_winner

TABLE = "report.md"


class ReportOptions(CommandOptions):
    """Write the table and plots of a study, finished or running."""

    model_config = SettingsConfigDict(cli_prog_name="python -m tune.report")

    study: CliPositionalArg[str | None] = Field(
        None, description="Name of the study. Default: the only one under the storage path."
    )
    storage: str = Field(
        storage.DEFAULT_PATH,
        validation_alias=AliasChoices("storage", "storage.path"),
        description="Storage path that holds the study.",
    )


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Write the report of a study; return a summary of its trials."""
    options = parse_options(ReportOptions, argv)
    root = storage.resolve_path(options.storage)
    study = Study.load(study_location(root, options.study or _only(root)))
    place = write_report(study)
    best = current_winner(study)
    print(trials_table(study, best), file=sys.stderr)
    return {
        "study": study.name,
        "report": place,
        "num_trials": len(study.trials),
        "states": count_states(study),
        "trial": best.number if best else None,
        "objectives": study.measured(best) if best else None,
    }


def write_report(study: Study, also: Callable[[Path], None] = lambda folder: None) -> str:
    """Write the table and plots to the study's folder; return the path or URL of the report.

    also: called with a local folder that holds the same files.
    """
    place = storage.join_path(study.url, REPORT)
    best = current_winner(study)
    fs, path = storage.filesystem(place)
    fs.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        plots.draw_study(study, best, lambda name: Path(folder, name))
        Path(folder, TABLE).write_text(trials_table(study, best))
        for file in Path(folder).iterdir():
            fs.put_file(str(file), storage.join_path(path, file.name))
        also(Path(folder))
    return place


def current_winner(study: Study) -> Trial | None:
    """Return the trial that would win at this point of the study, or None."""
    try:
        return select_winner(study)
    except CommandFailed:
        return None


def count_states(study: Study) -> dict[str, int]:
    """Return the number of trials by state; states without trials are left out."""
    states = [trial.state for trial in study.trials]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def trials_table(study: Study, best: Trial | None) -> str:
    """Return a Markdown table of all trials: the winner, other complete trials, then the rest."""
    goals, names = study.goals, list(study.config.tune.space)
    measured = [each.name for each in goals.measured]
    words = ", ".join(f"{count} {state}" for state, count in count_states(study).items())
    seconds = sum(trial.seconds for trial in study.trials)
    lines = [
        f"# Study {study.name}",
        "",
        f"{len(study.trials)} trials ({words}), {format_duration(seconds)} of training in total.",
        "",
        "| " + " | ".join(["trial", "state", "epoch", "s", *measured, *names]) + " |",
        "|" + "---|" * (4 + len(measured) + len(names)),
    ]
    complete = study.in_state("complete")
    points = [
        [each.signed(study.measured(trial)[each.name]) for each in goals.objectives]
        for trial in complete
    ]
    several = len(goals.objectives) > 1
    best_of_all = [complete[at] for at in pareto_front(points)] if several else []
    if several:
        lines.insert(3, "\nfront: complete trials that no other trial beats in all objectives.")
    order = {"complete": 0, "running": 1, "stopped": 2, "failed": 3}
    first = goals.pick.best

    def place(trial: Trial) -> tuple[Any, ...]:
        reached = -first.signed(study.measured(trial)[first.name]) if _is_done(trial) else 0
        return trial is not best, order[trial.state], reached, -trial.epoch, trial.number

    for trial in sorted(study.trials, key=place):
        figures = study.measured(trial) if _is_done(trial) else {}
        cells = [
            str(trial.number),
            "**winner**" if trial is best else "front" if trial in best_of_all else trial.state,
            str(trial.epoch),
            f"{trial.seconds:.1f}",
            *(format_value(figures[name]) if name in figures else "" for name in measured),
            *(format_value(trial.values[name]) for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for trial in study.trials:
        notes = [trial.cause] if trial.cause else []
        notes += [
            f"at epoch {each.epoch} it continued from trial {each.donor}, and until then had "
            + ", ".join(f"{name} {format_value(value)}" for name, value in each.values.items())
            for each in trial.takeovers
        ]
        refused = [
            f"{name} was not accepted by the gate ({served['verdict']})"
            for name, served in trial.served.items()
            if served["verdict"] != "accepted"
        ]
        lines += (
            [f"\ntrial {trial.number}: {'; '.join(notes + refused)}"] if notes + refused else []
        )
    return "\n".join(lines) + "\n"


def _is_done(trial: Trial) -> bool:
    return trial.state == "complete"


def _only(root: str) -> str:
    names = storage.list_names(study_location(root, ""))
    if len(names) != 1:
        raise UserError(
            f"there are several studies, {', '.join(names)}; name one of them."
            if names
            else f"there is no study at '{root}'; start one with: python tune/main.py"
        )
    return names[0]


if __name__ == "__main__":
    run_command(main)
