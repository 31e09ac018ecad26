"""Plots of a study, finished or running."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import optuna
from optuna.trial import TrialState, create_trial

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.metrics import best_epoch
from tune.objectives import Objective, pareto_front
from tune.reports.progress import format_value
from tune.run.study_store import Study
from tune.run.trial_record import Trial

COLORS = {"complete": "tab:blue", "stopped": "0.65", "failed": "tab:red", "running": "tab:orange"}
BEST = "tab:green"
# Fewer trials are too few to estimate importances or to cut off an axis.
LEAST_TRIALS = 6
# Choices of an option that are labelled; more labels would overlap.
NAMED_CHOICES = 6


def draw_study(study: Study, winner: Trial | None, file: Callable[[str], Path]) -> None:
    """Draw the plots for which the study has data.

    file: returns the path to write to, given the name of a file.
    """
    if not any(trial.reports for trial in study.trials):
        return
    plot_history(study, winner, file("history.png"))
    plot_rungs(study, winner, file("rungs.png"))
    plot_parallel(study, winner, file("parallel.png"))
    if (found := compute_importances(study)) is not None:
        plot_importance(*found, file("importance.png"))
    if len(study.goals.measured) > 1 and study.in_state("complete"):
        plot_pareto(study, winner, file("pareto.png"))


def plot_history(study: Study, winner: Trial | None, path: Path) -> None:
    """Plot the figures of each trial over the time at which it ended, and the best so far."""
    measured = study.goals.measured
    figure, axes = plt.subplots(
        len(measured), 1, figsize=(9, 1 + 3 * len(measured)), layout="constrained", squeeze=False
    )
    start = min(trial.began for trial in study.trials)
    for axis, objective in zip(axes[:, 0], measured, strict=True):
        complete = sorted(study.in_state("complete"), key=_end)
        for state in ("stopped", "running"):
            some = [trial for trial in study.in_state(state) if trial.reports]
            if some and objective.variant is None:
                ends = [(_end(trial) - start) / 60 for trial in some]
                values = [_kept(study, trial)[objective.metric.name] for trial in some]
                axis.scatter(ends, values, marker="x", s=24, color=COLORS[state], label=state)
        ends = [(_end(trial) - start) / 60 for trial in complete]
        values = [study.measured(trial)[objective.name] for trial in complete]
        axis.scatter(ends, values, s=24, color=COLORS["complete"], label="complete")
        if values:
            best = np.maximum.accumulate([objective.signed(value) for value in values])
            axis.step(ends, [objective.signed(value) for value in best], where="post", color=BEST)
        if winner is not None:
            place = (_end(winner) - start) / 60, study.measured(winner)[objective.name]
            axis.scatter(*place, s=90, facecolors="none", edgecolors=BEST, label="winner")
        axis.set(xlabel="minutes since the first trial began", ylabel=objective.name)
        _to_what_matters(axis, objective, values)
        axis.legend(fontsize=8)
    figure.suptitle(f"{study.name}: {len(study.trials)} trials")
    _save(figure, path)


def plot_rungs(study: Study, winner: Trial | None, path: Path) -> None:
    """Plot the metric that decides which trials end early, and how many trials reached an epoch."""
    early = study.goals.early
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    drawn = [trial for trial in study.trials if trial.reports]
    labelled: set[str] = set()
    for trial in sorted(drawn, key=lambda trial: trial is winner):
        word = "winner" if trial is winner else trial.state
        left.plot(
            [row["epoch"] for row in trial.rows],
            [row[early.name] for row in trial.rows],
            color=BEST if trial is winner else COLORS[trial.state],
            linewidth=2 if trial is winner else 0.8,
            marker="o" if trial.epoch == 1 else None,
            markersize=3,
            label=None if word in labelled else word,
        )
        labelled.add(word)
        for takeover in trial.takeovers:
            left.axvline(takeover.epoch, color="0.9", zorder=0)
    left.set(xlabel="epoch", ylabel=early.name, title="Every trial")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    finals = [row[early.name] for trial in drawn for row in trial.rows[-1:]]
    _to_what_matters(left, Objective(early.name, None, early), finals)
    left.legend(fontsize=8)
    most = max(trial.epoch for trial in drawn)
    epochs = np.arange(1, most + 1)
    reached = [sum(trial.epoch >= epoch for trial in drawn) for epoch in epochs]
    right.step(epochs, reached, where="mid", color=COLORS["complete"])
    right.fill_between(epochs, reached, step="mid", alpha=0.2, color=COLORS["complete"])
    share = sum(reached) / (len(drawn) * most)
    right.set(
        xlabel="epoch",
        ylabel="trials that reached the epoch",
        ylim=(0, None),
        title=f"{sum(reached)} epochs were trained, {share:.0%} of those without early stopping",
    )
    _save(figure, path)


def plot_parallel(study: Study, winner: Trial | None, path: Path) -> None:
    """Plot a line for each trial, through its options and the rank of its result."""
    space, early = study.config.tune.space, study.goals.early
    drawn = [trial for trial in study.trials if trial.reports]
    values = np.array([early.signed(_kept(study, trial)) for trial in drawn])
    axis_of = Objective(early.name, None, early)
    # Ranks, because a few trials that failed to learn would stretch an axis of values.
    ranks = np.argsort(np.argsort(values)) / max(len(values) - 1, 1)
    names = [*space, early.name]
    figure, axis = plt.subplots(figsize=(1.6 * len(names) + 1, 4.5), layout="constrained")
    colors = plt.get_cmap("viridis")
    for trial, rank in sorted(zip(drawn, ranks, strict=True), key=lambda pair: pair[1]):
        places = [dimension.place(trial.values[name]) for name, dimension in space.items()]
        chosen = trial is winner
        axis.plot(
            [*places, rank],
            color=BEST if chosen else colors(rank),
            alpha=1 if chosen else 0.25 + 0.5 * rank,
            linewidth=2.5 if chosen else 1,
            zorder=3 if chosen else 2,
        )
    for at, dimension in enumerate(space.values()):
        axis.axvline(at, color="0.8", zorder=0)
        if dimension.choice is not None:
            for choice in dimension.choice[:NAMED_CHOICES]:
                axis.text(at, dimension.place(choice), f" {format_value(choice)}", fontsize=7)
        else:
            for end, place, below in zip(dimension.ends, (0, 1), ("top", "bottom"), strict=True):
                axis.text(at, place, format_value(end), fontsize=8, ha="center", va=below)
    for rank, word in ((0, "worst"), (1, "best")):
        value = axis_of.signed(float(values[np.argmax(ranks == rank)]))
        axis.text(len(space), rank, f" {word} {format_value(value)}", fontsize=8)
    axis.set_xticks(range(len(names)), [name.replace(".", ".\n") for name in names], fontsize=8)
    axis.tick_params(axis="x", length=0, pad=10)
    axis.set(yticks=[], ylim=(-0.06, 1.06), title="Options of each trial, by rank of its result")
    for side in ("left", "right", "top", "bottom"):
        axis.spines[side].set_visible(False)
    _save(figure, path)


def compute_importances(study: Study) -> tuple[dict[str, float], int] | None:
    """Return the share of the metric's variance that each option explains (fANOVA), and the epoch.

    The epoch is the last one that enough trials reached: a comparison of trials with different
    lengths would show the scheduler's effect. Returns None if there are too few trials.
    """
    early = study.goals.early
    epochs = sorted((trial.epoch for trial in study.trials), reverse=True)
    wanted = max(LEAST_TRIALS, len(epochs) // 2)
    if len(epochs) < LEAST_TRIALS or (epoch := epochs[min(wanted, len(epochs)) - 1]) < 1:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = optuna.create_study(direction="maximize")
    space = study.config.tune.space
    for trial in study.trials:
        rows = [row for row in trial.rows if row["epoch"] == epoch]
        if rows and np.isfinite(rows[0][early.name]):
            known.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    value=early.signed(rows[0]),
                    params={name: space[name].raw(value) for name, value in trial.values.items()},
                    distributions={name: each.distribution() for name, each in space.items()},
                )
            )
    values = {trial.value for trial in known.get_trials(deepcopy=False)}
    if len(values) < LEAST_TRIALS - 1:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(known, evaluator=evaluator), epoch


def plot_importance(shares: dict[str, float], epoch: int, path: Path) -> None:
    """Plot the shares that `compute_importances` returned, for an epoch."""
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(shares)), layout="constrained")
    names = list(shares)[::-1]
    bars = axis.barh(names, [shares[name] for name in names], color=COLORS["complete"])
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set(xlim=(0, 1), xlabel=f"share of the variance at epoch {epoch} that the option explains")
    for side in ("right", "top"):
        axis.spines[side].set_visible(False)
    _save(figure, path)


def plot_pareto(study: Study, winner: Trial | None, path: Path) -> None:
    """Plot the complete trials by pairs of figures, with a line through the Pareto front."""
    complete = study.in_state("complete")
    first, *others = study.goals.measured
    figure, axes = plt.subplots(
        1, len(others), figsize=(6.5 * len(others), 5), layout="constrained", squeeze=False
    )
    for axis, other in zip(axes[0], others, strict=True):
        points = [study.measured(trial) for trial in complete]
        xs, ys = ([point[each.name] for point in points] for each in (other, first))
        axis.scatter(xs, ys, s=28, color=COLORS["complete"], zorder=2)
        pairs = [(other.signed(x), first.signed(y)) for x, y in zip(xs, ys, strict=True)]
        best = sorted(pareto_front(pairs), key=lambda at: xs[at])
        axis.plot([xs[at] for at in best], [ys[at] for at in best], color=BEST, zorder=1)
        for at in best:
            axis.annotate(
                str(complete[at].number),
                (xs[at], ys[at]),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
            )
        if winner is not None:
            found = study.measured(winner)
            axis.scatter(
                found[other.name],
                found[first.name],
                s=120,
                facecolors="none",
                edgecolors=BEST,
                linewidths=2,
                label=f"winner, trial {winner.number}",
            )
            axis.legend(fontsize=8)
        for condition in study.goals.pick.conditions:
            if condition.objective == other:
                axis.axvline(condition.bound, color="tab:red", linestyle=":")
            if condition.objective == first:
                axis.axhline(condition.bound, color="tab:red", linestyle=":")
        axis.set(xlabel=other.name, ylabel=first.name)
    figure.suptitle("Complete trials; on the line are those that no other trial beats in both")
    _save(figure, path)


def _end(trial: Trial) -> float:
    last = trial.reports[-1].time if trial.reports else trial.began
    return trial.ended_at or last


def _kept(study: Study, trial: Trial) -> dict[str, float]:
    return dict(best_epoch(trial.rows, study.choice))


def _to_what_matters(axis: Axes, objective: Objective, values: Sequence[float]) -> None:
    """Scale an axis so that differences among good trials are visible despite bad ones."""
    finite = [value for value in values if np.isfinite(value)]
    if not objective.maximize and all(value > 0 for value in finite):
        axis.set_yscale("log")
    elif len(finite) >= LEAST_TRIALS and objective.maximize:
        middle, best = np.quantile(finite, [0.25, 1])
        if best > middle:
            axis.set_ylim(max(min(finite), best - 3 * (best - middle)), None)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
