"""The page itself, from what the bundle holds and the test split."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.bundle import BundleWriter
from train.bundle.bundle import BASELINE
from train.bundle.manifest import Manifest, Variant
from train.card import figures, origin, usage
from train.card.figures import LEAST_RECORDS, ClassFigures, Slice
from train.card.html import Markup, bar, joined, listing, page, picture, section, table, tag
from train.tasks import Arrays, LabelsTarget, NamedTarget, Task

CARD = "report/card.html"
# Classes in the table; of more, those that are told worst.
MAX_CLASSES = 50
PICTURES = {
    "curves": "Loss, the metric and the learning rate by epoch",
    "confusion": "Share of each true class that was predicted as each class",
    "calibration": "Accuracy against confidence",
    "values": "Predicted against true values, and the errors",
    "mistakes": "The test images that were wrong with the most confidence",
    "variants": "Each variant's metric against its latency and throughput",
    "data": "The target in the training records, and what is missing of each column",
}


def write(
    writer: BundleWriter, manifest: Manifest, inputs: Arrays, targets: np.ndarray, outputs: Arrays
) -> Manifest:
    """Write the card beside the files of a bundle that is else whole; return the manifest with it.

    inputs, targets, outputs: of the test split, outputs by the default variant.
    """
    folder = writer.path / "report"
    pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    history, notes = folder / "history.json", folder / "data.txt"
    content = card(
        manifest,
        inputs,
        targets,
        outputs,
        baseline=json.loads((writer.path / BASELINE).read_text()),
        history=json.loads(history.read_text()) if history.exists() else [],
        pictures=pictures,
        notes=notes.read_text() if notes.exists() else "",
    )
    writer.file(CARD).write_text(content, encoding="utf-8")
    return manifest.model_copy(update={"files": writer.files()})


def card(
    manifest: Manifest,
    inputs: Arrays,
    targets: np.ndarray,
    outputs: Arrays,
    *,
    baseline: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    pictures: Mapping[str, bytes],
    notes: str,
) -> str:
    """Return the card as a page of HTML.

    inputs, targets, outputs: of the test split, outputs by the default variant. baseline: as
    baseline.json has it. pictures: PNG files by name. notes: the data report.
    """
    task = Task.from_dict(manifest.task)
    classes = figures.per_class(task.target, outputs, targets)
    sliced = figures.slices(task, inputs, targets, outputs)
    shown = {
        name: picture(pictures[name], words) for name, words in PICTURES.items() if name in pictures
    }
    return page(
        f"{manifest.name}: model card",
        *_what(manifest, task),
        _metrics(manifest, task, shown),
        _classes(classes, shown),
        _slices(task, sliced),
        usage.limits(manifest, task, classes),
        _variants(manifest, task, shown),
        origin.data(manifest, task, shown, notes),
        origin.training(manifest, history, shown),
        origin.normal(baseline),
        usage.use(manifest, task),
        origin.files(manifest, CARD),
    )


def _what(manifest: Manifest, task: Task) -> list[Markup]:
    columns = ", ".join(task.features.columns)
    facts = [
        ("made", manifest.created.replace("T", " ").replace("+00:00", " UTC")),
        ("default variant", manifest.default_variant),
        ("weights", f"{manifest.variants[manifest.default_variant].size_bytes:,} bytes"),
        ("seed", manifest.seed),
        *((name, value) for name, value in manifest.lineage.items() if isinstance(value, str)),
    ]
    return [
        tag("h1", manifest.name),
        tag("p", f"{_purpose(task)} from {columns}."),
        table(("", ""), [(tag("b", name), value) for name, value in facts]),
    ]


def _purpose(task: Task) -> str:
    target = task.target
    if isinstance(target, LabelsTarget):
        return f"Says which of {len(target.classes)} labels a record has ({target.column})"
    if isinstance(target, NamedTarget):
        return f"Tells which of {len(target.classes)} classes a record is of ({target.column})"
    return f"Predicts {target.column}"


def _metrics(manifest: Manifest, task: Task, shown: Mapping[str, Markup]) -> Markup:
    default = manifest.default_variant
    columns = {"fp32": manifest.metrics, default: manifest.variants[default].metrics}
    rows = [
        (
            name,
            *(
                _number(metrics.get(f"{split}_{name}"))
                for metrics in columns.values()
                for split in ("valid", "test")
            ),
        )
        for name in task.target.metric_names
    ]
    heads = [f"{name}, {split}" for name in columns for split in ("valid", "test")]
    return section(
        "How good it is",
        tag(
            "p",
            f"{task.metric} decides. The best epoch and the variants were chosen on the validation "
            "split; the test split no choice has seen.",
        ),
        table(("metric", *heads), rows, numbers=range(1, 1 + len(heads))),
        *(shown[name] for name in ("values", "calibration") if name in shown),
    )


def _classes(classes: Sequence[ClassFigures], shown: Mapping[str, Markup]) -> Markup:
    if not classes:
        return Markup()
    worst = sorted(classes, key=lambda each: each.f1)[:MAX_CLASSES]
    left_out = len(classes) - len(worst)
    words = "On the test split, by the default variant; the worst first."
    if left_out:
        words += f" {left_out} more are better than these."
    rows = [
        (
            each.name,
            *(f"{value:.3f}" for value in (each.precision, each.recall, each.f1)),
            f"{each.support:,}",
            bar(each.f1),
        )
        for each in worst
    ]
    return section(
        "Each class",
        tag("p", words),
        table(("class", "precision", "recall", "F1", "records", ""), rows, numbers=(1, 2, 3, 4)),
        *(shown[name] for name in ("confusion", "mistakes") if name in shown),
    )


def _slices(task: Task, sliced: Sequence[Slice]) -> Markup:
    if not sliced:
        return Markup()
    metric = figures.slice_metric(task.target)
    rows = [
        (
            each.quantity,
            each.values,
            f"{each.count:,}",
            _number(each.figure),
            f"{_number(each.low)} – {_number(each.high)}",
        )
        for each in sliced
    ]
    return section(
        "Where it is worse",
        tag(
            "p",
            f"The {metric} within parts of the test split, the worst first: by category, by "
            f"quartile of numbers, of at least {LEAST_RECORDS} records each. Of many parts some "
            "are worse by chance alone; the 95 % interval says how much chance may make.",
        ),
        table(("by", "part", "records", metric or "", "95 %"), rows, numbers=(2, 3, 4)),
    )


def _variants(manifest: Manifest, task: Task, shown: Mapping[str, Markup]) -> Markup:
    metric = f"test_{task.metric}"
    rows = [
        (
            tag("b", name) if name == manifest.default_variant else name,
            tag("span", variant.verdict, class_=variant.verdict),
            _number(variant.metrics.get(metric)),
            _drop(variant),
            f"{variant.size_bytes:,}",
            f"{variant.p50_ms:.3g}",
            f"{variant.records_per_s:,.0f}",
        )
        for name, variant in manifest.variants.items()
    ]
    heads = ("variant", "gate", metric, "worse on valid [95 %]", "bytes", "ms", "records/s")
    reasons = [
        (tag("b", name), f" {variant.verdict}: {variant.reason}")
        for name, variant in manifest.variants.items()
    ]
    reasons += [
        (tag("b", name), f" left out: {reason}") for name, reason in manifest.skipped.items()
    ]
    return section(
        "Variants",
        tag(
            "p",
            f"Only accepted ones are served; {manifest.default_variant} is the default, chosen for "
            f"{manifest.optimize_for}. Times are of one thread: ms of one record, records/s in "
            "batches of 32.",
        ),
        table(heads, rows, numbers=(2, 3, 4, 5, 6)),
        listing(map(joined, reasons)),
        shown.get("variants", Markup()),
    )


def _drop(variant: Variant) -> str:
    drop, low, high = variant.drop
    return f"{drop:+.4f} [{low:+.4f}, {high:+.4f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


__all__ = ["CARD", "card", "write"]
