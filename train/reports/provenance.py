"""Origin of a model, for its card: columns, options, choices and reference distributions."""

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

# Names shown in a list of categories, labels or classes.
MAX_NAMES = 8
# Size of a histogram in pixels.
WIDTH, HEIGHT = 160, 44


def describe_choice(manifest: Manifest, task: Task, history: Sequence[Mapping[str, float]]) -> str:
    """Return sentences on how the epoch, the decision rule and the variants were chosen.

    history: metrics by epoch.
    """
    config = Config.model_validate(manifest.config)
    metric = task.find_metric(config.epoch_metric)
    count = len(history)
    sentences = []
    if (imported := manifest.imported) is not None:
        sentences.append(
            f"The model was trained elsewhere. In ONNX Runtime it was compared with the original "
            f"({imported.library}) on {imported.num_records:,} records; the largest difference was "
            f"{imported.max_difference:.2g}."
        )
    elif metric == LAST_EPOCH:
        sentences.append(
            f"The weights are those of the last of {count} epochs, not selected by a metric."
        )
    elif history:
        best = best_epoch(history, metric)["epoch"]
        sentences.append(
            f"The weights are those of epoch {best} of {count}, which has the best {metric.name}."
        )
    if config.stop.after is not None and config.stop.folds:
        sentences[-1:] = [
            f"Cross-validation with {config.stop.folds} folds of the training records selected "
            f"{count} epochs by the mean {config.stop.metric}; the model was then trained on all "
            "of these records."
        ]
    elif config.stop.metric is not None and count < config.optim.epochs:
        sentences.append(
            f"Training stopped because {config.stop.metric} had not improved for "
            f"{config.stop.patience} epochs."
        )
    if config.data.train_on_valid:
        sentences.append("The model was also trained on the validation records.")
    if isinstance(task.target, NamedTarget) and task.target.temperature != 1:
        sentences.append(
            "Probabilities are calibrated on the validation split with a temperature of "
            f"{task.target.temperature:.3g}."
        )
    if isinstance(task.target, NamedTarget):
        sentences += _describe_rule(task.target, config.decision_rule)
    judged = (config.compress.metric or task.metric).removeprefix("valid_")
    sentences.append(
        f"Variants were accepted or refused by {judged} on the validation split. The test split "
        "was not used for any choice."
    )
    return " ".join(sentences)


def _describe_rule(target: NamedTarget, rule: DecisionRule) -> Iterator[str]:
    """Yield a sentence on when a class or label is predicted, if there is a decision rule."""
    names = target.classes
    if isinstance(target, ClassTarget):
        names = (target.classes[target.rarest],)
    if target.thresholds:
        goal = "the lowest cost" if rule.recall is None else f"a recall of {rule.recall:g}"
        from_on = ", ".join(
            f"'{name}' at a probability of at least {threshold:.3g}"
            for name, threshold in zip(names[:MAX_NAMES], target.thresholds, strict=False)
        )
        yield f"For {goal} on records like the validation split, the model predicts {from_on}."
    elif target.costs:
        yield "The model predicts the class with the lowest expected cost."


def fields(task: Task) -> Iterator[tuple[str, str, str]]:
    """Yield name, kind and training statistics of each input column, and last of the target."""
    for encoder in task.features.encoders:
        if isinstance(encoder, Numbers):
            places = zip(encoder.names, encoder.mean_F, encoder.scale_F, strict=True)
            means = dict(zip(encoder.names, encoder.mean_F, strict=True))
            spread = {
                name: f"mean {mean:.4g}, standard deviation {scale:.4g}"
                for name, mean, scale in places
            }
            for each in encoder.columns:
                known = spread.get(each.column, "time of day, week and year")
                if each.kind == "boolean":
                    known = f"true in {means[each.column]:.1%} of the records"
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
        known = f"mean {target.mean:.4g}, standard deviation {target.scale:.4g}"
    yield f"{target.column} (the target)", str(target.to_dict()["kind"]), known


def changed_options(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the dotted names of options that differ from the default, with values as JSON."""
    given = Config.model_validate(config).model_dump(mode="json", exclude_defaults=True)

    def below(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            # The kinds of columns are shown in the table of fields.
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
    """The distribution of one quantity of the baseline: a small histogram and a caption."""

    name: str
    words: str
    bars: list[Bar]
    width: int = WIDTH
    height: int = HEIGHT


def distributions(baseline: Mapping[str, Any]) -> Iterator[Distribution]:
    """Yield a distribution for each quantity of a baseline that a histogram can show.

    baseline: the content of baseline.json. Quantities without counts or with several dimensions
    are skipped.
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
    """Return a bar for each height between consecutive edges, scaled to the histogram's size.

    If all edges are equal, each bar has the full width.
    """
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
    """Return a value without the digits that were lost when it was scaled for the network."""
    largest = max(map(abs, edges)) or 1.0
    return f"{round(value, 5 - math.floor(math.log10(largest))) + 0.0:.4g}"


def _cut(edges: Sequence[float]) -> list[float]:
    """Return edges with the outer bins limited to the inner range, to keep inner bins visible."""
    if len(edges) < 4:
        return list(edges)
    inner = edges[-2] - edges[1]
    first, last = max(edges[0], edges[1] - inner), min(edges[-1], edges[-2] + inner)
    return [first, *edges[1:-1], last]
