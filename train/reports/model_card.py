"""The page itself, from what the bundle holds and the test split. Its text is in templates/."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from train.bundle import BundleWriter
from train.bundle.bundle import BASELINE
from train.bundle.manifest import Manifest
from train.reports import provenance, usage
from train.reports.slices import LEAST_RECORDS, class_metrics, slice_metric, worst_slices
from train.tasks import Arrays, LabelsTarget, NamedTarget, Task

CARD = "report/card.html"
TEMPLATES = Path(__file__).with_name("templates")
# Classes in the table; if there are more, those with the lowest F1.
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
# What XML cannot hold, even escaped.
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_card(
    writer: BundleWriter, manifest: Manifest, inputs: Arrays, targets: np.ndarray, outputs: Arrays
) -> Manifest:
    """Write the card beside the files of a bundle that is else whole; return the manifest with it.

    inputs, targets, outputs: of the test split, outputs by the default variant.
    """
    folder = writer.path / "report"
    pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    history, notes = folder / "history.json", folder / "data.txt"
    content = render_card(
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


def render_card(
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
    classes = class_metrics(task.target, outputs, targets)
    record = usage.example_record(task)
    return (
        _environment()
        .get_template("card.html.j2")
        .render(
            manifest=manifest,
            task=task,
            purpose=_purpose(task),
            facts=_facts(manifest),
            pictures={
                name: {"words": words, "source": _png_url(pictures[name])}
                for name, words in PICTURES.items()
                if name in pictures
            },
            metrics=_metrics(manifest, task),
            choice=provenance.describe_choice(manifest, task, history),
            classes=sorted(classes, key=lambda each: each.f1)[:MAX_CLASSES],
            num_better=max(len(classes) - MAX_CLASSES, 0),
            slices=worst_slices(task, inputs, targets, outputs),
            slice_metric=slice_metric(task.target) or "",
            least_records=LEAST_RECORDS,
            limitations=list(usage.limitations(manifest, task, classes)),
            splits={
                name: split for name, split in manifest.data.items() if isinstance(split, Mapping)
            },
            fields=list(provenance.fields(task)),
            notes=notes.rstrip(),
            history=history,
            epochs_s=sum(row.get("seconds", 0) for row in history),
            host={k: value for k, value in manifest.host.items() if isinstance(value, str | int)},
            options=list(provenance.changed_options(manifest.config)),
            distributions=list(provenance.distributions(baseline)),
            python_record=usage.python_record(record),
            curl_body=usage.curl_body(record),
            files={name: file for name, file in manifest.files.items() if name != CARD},
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": _number,
        "thousands": "{:,.0f}".format,
        "seconds": "{:,.1f}".format,
    }
    return environment


def _printable(value: Any) -> Any:
    """What a template shows, without characters that no page may hold."""
    return value if isinstance(value, Markup) else UNPRINTABLE.sub("\ufffd", str(value))


def _png_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _purpose(task: Task) -> str:
    target = task.target
    if isinstance(target, LabelsTarget):
        return f"Says which of {len(target.classes)} labels a record has ({target.column})"
    if isinstance(target, NamedTarget):
        return f"Tells which of {len(target.classes)} classes a record is of ({target.column})"
    return f"Predicts {target.column}"


def _facts(manifest: Manifest) -> list[tuple[str, Any]]:
    return [
        ("made", manifest.created.replace("T", " ").replace("+00:00", " UTC")),
        ("default variant", manifest.default_variant),
        ("weights", f"{manifest.variants[manifest.default_variant].size_bytes:,} bytes"),
        ("seed", manifest.seed),
        *((name, value) for name, value in manifest.lineage.items() if isinstance(value, str)),
    ]


def _metrics(manifest: Manifest, task: Task) -> dict[str, Any]:
    """The table of metrics: its heads, and a row of values for each metric."""
    default = manifest.default_variant
    columns = {
        "fp32": manifest.metrics,
        default: manifest.variants[default].metrics,
        **{each.name: each.metrics for each in manifest.simple_models},
    }
    splits = ("valid", "test")
    return {
        "heads": ["metric", *(f"{name}, {split}" for name in columns for split in splits)],
        "rows": [
            (
                name,
                [found.get(f"{split}_{name}") for found in columns.values() for split in splits],
            )
            for name in (each.name for each in task.known_metrics)
        ],
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


__all__ = ["CARD", "render_card", "write_card"]
