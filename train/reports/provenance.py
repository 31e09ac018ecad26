"""What a model was made of, for its card: columns, options, and the distributions it saw."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.bundle.manifest import Manifest
from train.config import Config, DecisionRule
from train.metrics import LAST_EPOCH, best_epoch
from train.tasks import Categories, ClassTarget, NamedTarget, Numbers, Task, Texts, ValueTarget
from train.tasks.columns.lists import LabelSet, Vector

# Names of a category that are shown.
MAX_NAMES = 8
# Of a histogram, in pixels.
WIDTH, HEIGHT = 160, 44


def describe_choice(manifest: Manifest, task: Task, history: Sequence[Mapping[str, float]]) -> str:
    """Say how the epoch and the variants were chosen, as the options have it."""
    config = Config.model_validate(manifest.config)
    metric = task.find_metric(config.epoch_metric)
    count = len(history)
    sentences = []
    if metric == LAST_EPOCH:
        sentences.append(f"The weights are those of the last of {count} epochs; none was chosen.")
    elif history:
        best = best_epoch(history, metric)["epoch"]
        sentences.append(
            f"The weights are those of epoch {best} of {count}, the best in {metric.name}."
        )
    if config.stop.after is not None and config.stop.folds:
        sentences[-1:] = [
            f"Cross-validation over {config.stop.folds} parts of the training records chose to "
            f"train for {count} epochs, by the mean {config.stop.metric}; the net was then trained "
            "on all of them."
        ]
    elif config.stop.metric is not None and count < config.optim.epochs:
        sentences.append(
            f"Training ended as {config.stop.metric} had not got better for {config.stop.patience} "
            "epochs."
        )
    if config.data.train_on_valid:
        sentences.append("The validation records were trained on too.")
    if isinstance(task.target, NamedTarget) and task.target.temperature != 1:
        sentences.append(
            "Probabilities are calibrated on the validation split, by a temperature of "
            f"{task.target.temperature:.3g}."
        )
    if isinstance(task.target, NamedTarget):
        sentences += _describe_rule(task.target, config.decision_rule)
    judged = (config.compress.metric or task.metric).removeprefix("valid_")
    sentences.append(
        f"Which variants are served was decided by {judged} on the validation split. No choice has "
        "seen the test split."
    )
    return " ".join(sentences)


def _describe_rule(target: NamedTarget, rule: DecisionRule) -> Iterator[str]:
    """Say when a class or a label is answered, where a decision rule was given."""
    names = target.classes
    if isinstance(target, ClassTarget):
        names = (target.classes[target.rarest],)
    if target.thresholds:
        goal = "the least cost" if rule.recall is None else f"a recall of {rule.recall:g}"
        from_on = ", ".join(
            f"'{name}' from a probability of {threshold:.3g} on"
            for name, threshold in zip(names[:MAX_NAMES], target.thresholds, strict=False)
        )
        yield f"For {goal} on records like the validation split it answers {from_on}."
    elif target.costs:
        yield "It answers the class with the least expected cost."


def fields(task: Task) -> Iterator[tuple[str, str, str]]:
    """Name, kind and what training knows of each input column, and of the target last."""
    for encoder in task.features.encoders:
        if isinstance(encoder, Numbers):
            places = zip(encoder.names, encoder.mean_F, encoder.scale_F, strict=True)
            means = dict(zip(encoder.names, encoder.mean_F, strict=True))
            spread = {
                name: f"mean {mean:.4g}, deviation {scale:.4g}" for name, mean, scale in places
            }
            for each in encoder.columns:
                known = spread.get(each.column, "time of day, week and year")
                if each.kind == "boolean":
                    known = f"true in {means[each.column]:.1%}"
                elif isinstance(each, Vector):
                    known = f"{len(each.places)} numbers"
                elif isinstance(each, LabelSet):
                    first = ", ".join(each.labels[:MAX_NAMES])
                    known = f"{len(each.labels)} labels: {first}" + "…" * (
                        len(each.labels) > MAX_NAMES
                    )
                yield each.column, each.kind, known
        elif isinstance(encoder, Categories):
            for column, names in zip(encoder.columns, encoder.names_C, strict=True):
                first = ", ".join(names[:MAX_NAMES]) + "…" * (len(names) > MAX_NAMES)
                yield column, "category", f"{len(names):,} names: {first}"
        elif isinstance(encoder, Texts):
            for column in encoder.columns:
                yield column, "text", f"a vocabulary of {encoder.size:,} tokens"
        else:
            kind = str(encoder.to_dict()["kind"])
            for field in encoder.fields:
                shape = " × ".join(map(str, field.shape))
                yield field.name, kind, f"{field.datatype} {shape}".strip()
    target = task.target
    known = ""
    if isinstance(target, NamedTarget):
        pairs = zip(target.classes, target.counts, strict=False)
        shown = [f"{name} {count:,}" for name, count in pairs]
        known = ", ".join(shown[:MAX_NAMES]) + "…" * (len(shown) > MAX_NAMES)
    elif isinstance(target, ValueTarget):
        known = f"mean {target.mean:.4g}, deviation {target.scale:.4g}"
    yield f"{target.column} (the target)", str(target.to_dict()["kind"]), known


def changed_options(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted names of the options that differ from the default, and their values as JSON."""
    given = Config.model_validate(config).model_dump(mode="json", exclude_defaults=True)

    def below(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            # What a column is belongs together, and the data say it.
            if isinstance(value, Mapping) and prefix + name != "features":
                yield from below(f"{prefix}{name}.", value)
            elif prefix + name != "features":
                yield prefix + name, json.dumps(value, ensure_ascii=False)

    yield from below("", given)


@dataclass(frozen=True)
class Bar:
    """A rectangle of a histogram, in pixels from its upper left corner."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Distribution:
    """How one quantity of the baseline is spread, as a small histogram and in words."""

    name: str
    words: str
    bars: list[Bar]
    width: int = WIDTH
    height: int = HEIGHT


def distributions(baseline: Mapping[str, Any]) -> Iterator[Distribution]:
    """The quantities of a baseline, as baseline.json has it, that a histogram can show.

    Those without counts or of several dimensions are left out.
    """
    for name, quantity in baseline.get("quantities", {}).items():
        counts = np.asarray(quantity.get("counts") or [], float)
        if counts.ndim != 1 or not counts.sum():
            continue
        shares = counts / counts.sum()
        if quantity["kind"] == "category":
            words = _most_frequent(quantity["labels"], shares)
            yield Distribution(name, words, histogram_bars(range(len(shares) + 1), shares.tolist()))
            continue
        edges = quantity["edges"]
        words = f"{_plain(edges[0], edges)} to {_plain(edges[-1], edges)}"
        if missing := shares[0]:
            words += f"; {missing:.1%} missing"
        drawn_edges = _cut(edges)
        widths = np.maximum(np.diff(drawn_edges), np.finfo(float).tiny)
        densities = (shares[2:-1] / widths).tolist()
        yield Distribution(name, words, histogram_bars(drawn_edges, densities))


def _most_frequent(labels: Sequence[str], shares: np.ndarray) -> str:
    order = np.argsort(-shares, kind="stable")[:MAX_NAMES]
    words = ", ".join(f"{labels[place]} {shares[place]:.0%}" for place in order if shares[place])
    return words + "…" * (int(np.count_nonzero(shares)) > MAX_NAMES)


def histogram_bars(edges: Sequence[float], heights: Sequence[float]) -> list[Bar]:
    """Bars between edges, drawn to the scale of the edges; one bar where they are all equal."""
    span = edges[-1] - edges[0]
    most = max(heights, default=0) or 1
    bars = []
    for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
        x = (low - edges[0]) / span * WIDTH if span > 0 else 0
        width = (high - low) / span * WIDTH if span > 0 else WIDTH
        tall = height / most * HEIGHT
        bars.append(Bar(x, HEIGHT - tall, max(width - 0.5, 0.5), tall))
    return bars


def _plain(value: float, edges: Sequence[float]) -> str:
    """A value without the digits that scaling for the net has lost."""
    largest = max(map(abs, edges)) or 1.0
    return f"{round(value, 5 - math.floor(math.log10(largest))) + 0.0:.4g}"


def _cut(edges: Sequence[float]) -> list[float]:
    """Edges with the outer bins no wider than all others together, which could not be seen else."""
    if len(edges) < 4:
        return list(edges)
    inner = edges[-2] - edges[1]
    first, last = max(edges[0], edges[1] - inner), min(edges[-1], edges[-2] + inner)
    return [first, *edges[1:-1], last]
