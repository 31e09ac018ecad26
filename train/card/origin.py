"""Sections that tell what a model was made of: data, options, files, and what is normal."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.bundle.manifest import Manifest
from train.card.html import Markup, code, histogram, section, table, tag
from train.config import Config
from train.tasks import Categories, NamedTarget, Numbers, Task, Texts, ValueTarget

# Names of a category that are shown.
MAX_NAMES = 8


def data(manifest: Manifest, task: Task, shown: Mapping[str, Markup], notes: str) -> Markup:
    splits = [
        (name, f"{each['num_records']:,}", each["source"])
        for name, each in manifest.data.items()
        if isinstance(each, Mapping)
    ]
    fields = list(_fields(task))
    return section(
        "Data",
        table(("split", "records", "source"), splits, numbers=(1,)),
        tag("p", "Digest of the encoded records: ", tag("code", manifest.data["digest"])),
        table(("field", "kind", "known of it from training"), fields),
        code(notes.rstrip()) if notes else Markup(),
        shown.get("data", Markup()),
    )


def _fields(task: Task) -> Iterator[tuple[str, str, str]]:
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


def training(
    manifest: Manifest, history: Sequence[Mapping[str, float]], shown: Mapping[str, Markup]
) -> Markup:
    given = [
        (tag("code", name), tag("code", json.dumps(value, ensure_ascii=False)))
        for name, value in _options(manifest.config)
    ]
    host = {name: value for name, value in manifest.host.items() if isinstance(value, str | int)}
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    epochs_s = sum(row.get("seconds", 0) for row in history)
    return section(
        "Training",
        tag(
            "p",
            f"{len(history)} epochs in {epochs_s:,.1f} s; {manifest.training_seconds:,.1f} s with "
            f"data, compression and measuring. {versions}.",
        ),
        tag("p", "Measured on: " + ", ".join(f"{name} {value}" for name, value in host.items()))
        if host
        else Markup(),
        shown.get("curves", Markup()),
        tag("p", "Options that are not the default:"),
        table(("option", "value"), given),
    )


def _options(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the options that differ from the default."""
    given = Config.model_validate(config).model_dump(mode="json", exclude_defaults=True)

    def below(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            # What a column is belongs together, and the data say it.
            if isinstance(value, Mapping) and prefix + name != "features":
                yield from below(f"{prefix}{name}.", value)
            elif prefix + name != "features":
                yield prefix + name, value

    yield from below("", given)


def normal(baseline: Mapping[str, Any]) -> Markup:
    parts = [
        part
        for name, quantity in baseline.get("quantities", {}).items()
        if (part := _quantity(name, quantity)) is not None
    ]
    if not parts:
        return Markup()
    return section(
        "What is normal",
        tag(
            "p",
            "How held-out records, and the answers to them, are spread. What is served is compared "
            "with this to tell drift. Areas are shares of records; long tails are drawn shorter.",
        ),
        tag("div", *parts, class_="grid"),
    )


def _quantity(name: str, quantity: Mapping[str, Any]) -> Markup | None:
    """A small picture of one quantity; None for one without counts or of several dimensions."""
    counts = np.asarray(quantity.get("counts") or [], float)
    if counts.ndim != 1 or not counts.sum():
        return None
    shares = counts / counts.sum()
    if quantity["kind"] == "category":
        labels = quantity["labels"]
        order = np.argsort(-shares, kind="stable")[:MAX_NAMES]
        words = ", ".join(
            f"{labels[place]} {shares[place]:.0%}" for place in order if shares[place]
        )
        words += "…" * (int(np.count_nonzero(shares)) > MAX_NAMES)
        drawn = histogram(range(len(shares) + 1), shares.tolist(), f"{name}: {words}")
        return tag("div", tag("b", name), drawn, words)
    edges = quantity["edges"]
    words = f"{_plain(edges[0], edges)} to {_plain(edges[-1], edges)}"
    if missing := shares[0]:
        words += f"; {missing:.1%} missing"
    drawn_edges = _cut(edges)
    widths = np.maximum(np.diff(drawn_edges), np.finfo(float).tiny)
    drawn = histogram(drawn_edges, (shares[2:-1] / widths).tolist(), f"{name}: {words}")
    return tag("div", tag("b", name), drawn, words)


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


def files(manifest: Manifest, card: str) -> Markup:
    rows = [
        (tag("code", name), f"{file.size_bytes:,}", tag("code", file.sha256))
        for name, file in manifest.files.items()
        if name != card
    ]
    return section(
        "Files",
        tag("p", "By their SHA-256. A file that differs is refused when the bundle is loaded."),
        table(("file", "bytes", "digest"), rows, numbers=(1,)),
    )
