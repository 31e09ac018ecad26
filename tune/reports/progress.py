"""Progress of the search: a live table on a terminal, otherwise a line for each ended trial."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune.run.study_store import Study
from tune.run.trial_record import Trial

# Least time in seconds between two updates of the table.
REFRESH_S = 0.25
MAX_ROWS = 12


class StudyDisplay:
    """Shows the progress of a study on stderr while its block runs."""

    def __init__(self, study: Study, parallel: int, console: Console | None = None) -> None:
        self._study, self._config, self._goals = study, study.config.tune, study.goals
        self._parallel = parallel
        self._console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._looked_at = self._started = time.monotonic()
        self._ended_before = sum(trial.ended for trial in study.trials)

    def __enter__(self) -> "StudyDisplay":
        tune = self._config
        turns = "taking turns" if tune.scheduling == "pbt" else f"{self._parallel} at a time"
        begun = f" ({len(self._study.trials)} of them exist)" if self._study.trials else ""
        self._console.print(
            f"study {self._study.name}: {tune.num_trials} trials{begun}, {turns}; sampler "
            f"{tune.sampler}, scheduler {tune.scheduling}; objectives "
            f"{', '.join(each.name for each in self._goals.objectives)}. If it is interrupted, "
            "run the same command to continue.",
            soft_wrap=True,
        )
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def look(self) -> None:
        now = time.monotonic()
        if self._console.is_terminal and now - self._looked_at >= REFRESH_S:
            self._looked_at = now
            self._live.update(self.table(), refresh=True)

    def ended(self, trial: Trial) -> None:
        """Print how a trial ended. On a terminal, only failed trials are printed."""
        if self._console.is_terminal and trial.state != "failed":
            return
        values = ", ".join(f"{name} {format_value(value)}" for name, value in trial.values.items())
        if trial.state == "failed":
            outcome = f"failed: {trial.cause}"
        else:
            word = "complete" if trial.state == "complete" else f"stopped at epoch {trial.epoch}"
            outcome = f"{word}: {self._figures(trial)}"
        best = self.best()
        known = f" (best: {self._figures(best)}, trial {best.number})" if best else ""
        self._console.print(
            f"trial {trial.number} {outcome}{known}; {trial.seconds:.1f} s; {values}",
            soft_wrap=True,
            markup=False,
        )

    def best(self) -> Trial | None:
        """Return the best complete trial by the rule for the winner, without its bounds."""
        best = self._goals.pick.best
        complete = self._study.in_state("complete")
        return max(
            complete,
            key=lambda trial: best.signed(self._study.measured(trial)[best.name]),
            default=None,
        )

    def table(self) -> Group:
        """Return the table of trials, with a summary below it."""
        study, best = self._study, self.best()
        names = list(self._config.space)
        table = Table(box=None, pad_edge=False)
        for heading in ("trial", "", "epoch", *self._goals_shown(), *names):
            table.add_column(heading, justify="right" if heading else "left", overflow="fold")
        running = study.in_state("running")
        recent = [trial for trial in study.trials if trial.ended and trial is not best]
        rows = [*([best] if best else []), *running, *reversed(recent)][:MAX_ROWS]
        for trial in rows:
            word = "best" if trial is best else trial.state
            table.add_row(
                str(trial.number),
                Text(word, style={"best": "bold green", "failed": "red"}.get(word, "")),
                str(trial.epoch),
                *self._cells(trial),
                *(format_value(trial.values[name]) for name in names),
                style="dim" if trial.state == "stopped" else "",
            )
        return Group(table, Text(self._summary()))

    def _summary(self) -> str:
        study, total = self._study, self._config.num_trials
        counts = {
            state: len(study.in_state(state))
            for state in ("complete", "stopped", "failed", "running")
        }
        ended = sum(counts.values()) - counts["running"]
        words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        elapsed = time.monotonic() - self._started
        here = ended - self._ended_before
        left = f", about {format_duration(elapsed / here * (total - ended))} left" if here else ""
        return f"{ended} of {total} trials: {words}; {format_duration(elapsed)} so far{left}"

    def _goals_shown(self) -> list[str]:
        return [each.name for each in self._goals.measured]

    def _cells(self, trial: Trial) -> list[str]:
        figures = self._known(trial)
        return [
            format_value(figures[name]) if name in figures else "…" for name in self._goals_shown()
        ]

    def _figures(self, trial: Trial) -> str:
        words = (f"{name} {format_value(value)}" for name, value in self._known(trial).items())
        return ", ".join(words) or "no figures"

    def _known(self, trial: Trial) -> dict[str, float]:
        """Return all figures of a complete trial; of any other, the metric of its last epoch."""
        if trial.state == "complete":
            return self._study.measured(trial)
        early = self._goals.early.name
        return {early: trial.rows[-1][early]} if trial.reports else {}


def format_value(value: Any) -> str:
    """Return a short text for the value of an option or for a figure."""
    if isinstance(value, bool) or not isinstance(value, float):
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, such as `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
