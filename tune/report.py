"""python -m tune.report [STUDY] [--storage.path PATH]: a study's table and pictures, made anew.

Of a study that is finished, or while it runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import Failed, UserError, run_command
from tune import pictures
from tune.display import clock, shown
from tune.objectives import front
from tune.pick import winner
from tune.study import REPORT, Study, Trial, location

TABLE = "report.md"


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m tune.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", help="its name; the only one's if there is one")
    parser.add_argument("--storage.path", dest="storage", default=storage.DEFAULT_PATH)
    options = parser.parse_args(argv)
    root = storage.resolve(options.storage)
    study = Study.load(location(root, options.study or _only(root)))
    place = write(study)
    best = chosen(study)
    print(table(study, best), file=sys.stderr)
    return {
        "study": study.name,
        "report": place,
        "num_trials": len(study.trials),
        "states": counts(study),
        "trial": best.number if best else None,
        "objectives": study.measured(best) if best else None,
    }


def write(study: Study, also: Callable[[Path], None] = lambda folder: None) -> str:
    """Write the table and the pictures into the study's folder; return where they are.

    also: called with a local folder that holds them.
    """
    place = storage.join(study.url, REPORT)
    best = chosen(study)
    fs, path = storage.filesystem(place)
    fs.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        pictures.draw(study, best, lambda name: Path(folder, name))
        Path(folder, TABLE).write_text(table(study, best))
        for file in Path(folder).iterdir():
            fs.put_file(str(file), storage.join(path, file.name))
        also(Path(folder))
    return place


def chosen(study: Study) -> Trial | None:
    """The trial that wins as the study stands, or None."""
    try:
        return winner(study)
    except Failed:
        return None


def counts(study: Study) -> dict[str, int]:
    """How many trials are in each state that there is."""
    states = [trial.state for trial in study.trials]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def table(study: Study, best: Trial | None) -> str:
    """All trials in Markdown: complete ones first, the best before all."""
    goals, names = study.goals, list(study.config.tune.space)
    measured = [each.name for each in goals.measured]
    words = ", ".join(f"{count} {state}" for state, count in counts(study).items())
    seconds = sum(trial.seconds for trial in study.trials)
    lines = [
        f"# Study {study.name}",
        "",
        f"{len(study.trials)} trials ({words}), {clock(seconds)} of trials in all.",
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
    best_of_all = [complete[at] for at in front(points)] if several else []
    if several:
        lines.insert(3, "\nfront: trials that no other complete one beats in all objectives.")
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
            *(shown(figures[name]) if name in figures else "" for name in measured),
            *(shown(trial.values[name]) for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for trial in study.trials:
        notes = [trial.cause] if trial.cause else []
        notes += [
            f"at epoch {each.epoch} it took over from trial {each.donor}, and had "
            + ", ".join(f"{name} {shown(value)}" for name, value in each.values.items())
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
    fs, path = storage.filesystem(location(root, ""))
    names = sorted(
        each.rstrip("/").rsplit("/", 1)[-1]
        for each in (fs.ls(path, detail=False) if fs.exists(path) else [])
    )
    if len(names) != 1:
        raise UserError(
            f"there are the studies {', '.join(names)}; name one."
            if names
            else f"there is no study at '{root}'; search with: python tune/main.py"
        )
    return names[0]


if __name__ == "__main__":
    run_command(main)
