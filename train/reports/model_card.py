"""Rendering of the model card from a bundle's files and the test split, with templates/.

Shapes: N test records, K classes, labels or outputs.
"""

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
from train.bundle.manifest import ImportedModel, Manifest
from train.reports import provenance, usage
from train.reports.slices import LEAST_RECORDS, class_metrics, slice_metric, worst_slices
from train.tasks import Arrays, LabelsTarget, NamedTarget, Task
from train.values.ragged import StoredArrays

CARD = "report/card.html"
TEMPLATES = Path(__file__).with_name("templates")
# Rows in the table of classes; if there are more classes, those with the lowest F1.
MAX_CLASSES = 50
PICTURES = {
    "curves": "Loss, metric and learning rate by epoch",
    "confusion": "Confusion matrix: share of each true class predicted as each class",
    "calibration": "Accuracy against confidence",
    "values": "Predicted against true values, and the distribution of errors",
    "mistakes": "Misclassified test images with the highest confidence",
    "variants": "Each variant's metric against its latency and throughput",
    "data": "Distribution of the target in the training records, and share of missing values",
}
# Characters that XML does not allow, even escaped.
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_card(
    writer: BundleWriter,
    manifest: Manifest,
    inputs: StoredArrays,
    targets: np.ndarray,
    outputs: Arrays,
) -> Manifest:
    """Write the card of a bundle that is otherwise complete; return the manifest that lists it.

    inputs, targets, outputs: the test split and the default variant's outputs, as in `render_card`:
    [N, ...], [N] or [N, K], and {"logits": [N, K]}.
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
    inputs: StoredArrays,
    targets: np.ndarray,
    outputs: Arrays,
    *,
    baseline: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    pictures: Mapping[str, bytes],
    notes: str,
) -> str:
    """Return the card as an HTML page.

    inputs: encoded arrays [N, ...] of the test split by name. targets: its encoded targets, [N] or,
    for multilabel tasks, uint8 [N, K]. outputs: the default variant's {"logits": float32 [N, K]}.
    baseline: the content of baseline.json. history: metrics by epoch. pictures: PNG files by name.
    notes: the data report.
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
    """Return a value of a template with characters that XML does not allow replaced."""
    return value if isinstance(value, Markup) else UNPRINTABLE.sub("\ufffd", str(value))


def _png_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _purpose(task: Task) -> str:
    target = task.target
    if isinstance(target, LabelsTarget):
        return f"Predicts which of {len(target.classes)} labels apply to a record ({target.column})"
    if isinstance(target, NamedTarget):
        return f"Predicts one of {len(target.classes)} classes for a record ({target.column})"
    return f"Predicts {target.column}"


def _facts(manifest: Manifest) -> list[tuple[str, Any]]:
    return [
        ("created", manifest.created.replace("T", " ").replace("+00:00", " UTC")),
        ("default variant", manifest.default_variant),
        ("size of variant", f"{manifest.variants[manifest.default_variant].size_bytes:,} bytes"),
        ("seed", manifest.seed),
        *((name, value) for name, value in manifest.lineage.items() if isinstance(value, str)),
        *_pretrained(manifest.config["net"]),
        *_imported(manifest.imported),
    ]


def _pretrained(net: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return source, licence and digest of the pretrained encoder, if the network has one."""
    known = net.get("checkpoint")
    if known is None:
        return []
    return [
        ("pretrained encoder", net["pretrained"]),
        ("licence of the encoder", known["licence"] or "none named"),
        ("weights of the encoder", f"SHA-256 {known['sha256']}"),
    ]


def _imported(imported: ImportedModel | None) -> list[tuple[str, str]]:
    """Return kind, origin and digest of a model that another library trained."""
    if imported is None:
        return []
    return [
        ("imported model", f"{imported.model} ({imported.library})"),
        ("imported from", f"{imported.source}, {imported.format}, SHA-256 {imported.sha256}"),
    ]


def _metrics(manifest: Manifest, task: Task) -> dict[str, Any]:
    """Return the column heads of the table of metrics and a row of values for each metric."""
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
