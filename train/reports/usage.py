"""Usage notes for the model card: limitations of the model and an example record."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.bundle.manifest import Manifest
from train.reports.slices import ClassMetrics
from train.tasks import (
    Categories,
    Images,
    LabelsTarget,
    NamedTarget,
    Numbers,
    Task,
    Texts,
    ValueTarget,
)
from train.tasks.columns.image import LEAST_HEIGHT, MOST_HEIGHTS
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.scalars import Date
from train.values.ragged import FREE

# With fewer test records, the recall of a class is too uncertain.
FEW_RECORDS = 30
# Names listed in a sentence; further names are replaced by "…".
MAX_NAMES = 8


def limitations(manifest: Manifest, task: Task, classes: Sequence[ClassMetrics]) -> Iterator[str]:
    """Yield sentences on the limitations of the model.

    classes: metrics of each class on the test split; empty if the target has no classes.
    """
    test = manifest.data["test"]
    yield (
        f"All test metrics are measured on {test['num_records']:,} records of {test['source']}. "
        "Metrics on data of another origin or time may differ; measure them with feedback."
    )
    if manifest.config.get("data", {}).get("train_on_valid"):
        yield (
            "The model was also trained on the validation records, so validation metrics are too "
            "optimistic."
        )
    few = [each.name for each in classes if each.support < FEW_RECORDS]
    if few:
        names = ", ".join(few[:MAX_NAMES]) + "…" * (len(few) > MAX_NAMES)
        yield (
            f"Classes with fewer than {FEW_RECORDS} test records, whose metrics are uncertain: "
            f"{names}."
        )
    if isinstance(task.target, NamedTarget) and not isinstance(task.target, LabelsTarget):
        yield (
            f"The model always predicts one of its {len(task.target.classes)} classes, even for a "
            "record that belongs to none of them."
        )
    elif isinstance(task.target, ValueTarget):
        yield (
            "The model predicts a value without an interval, also for inputs outside the range of "
            "the training records."
        )
    for encoder in task.features.encoders:
        if isinstance(encoder, Images):
            height, width, channels = encoder.shape_HWC
            kind = "grey" if channels == 1 else "colour"
            size = f"{height} × {width} pixels"
            if encoder.has_free_height:
                size = (
                    f"a width of {width} pixels, and a height of {LEAST_HEIGHT} to "
                    f"{MOST_HEIGHTS * width} that keeps its aspect ratio"
                )
            yield (
                f"Every image ({encoder.column}) is resized to {size}, {kind}; "
                "details smaller than a pixel of the resized image are lost."
            )
        elif isinstance(encoder, Texts):
            yield (
                f"Texts ({', '.join(encoder.columns)}) are cut to {encoder.max_tokens} tokens in "
                "total; all words outside the vocabulary share one token."
            )
        elif isinstance(encoder, Categories):
            yield (
                "All category names that are not in the training records are treated as one name "
                f"({', '.join(encoder.columns)})."
            )
    yield "Slices are formed by input columns only; fairness by other attributes is not measured."


def example_record(task: Task) -> dict[str, Any]:
    """Return a record that the model accepts. An image is {"b64": name of a file}."""
    return {field: _example(task, field) for field in task.features.columns}


def python_record(record: Mapping[str, Any]) -> str:
    """Return the record as a Python dictionary expression, which reads images from their files."""
    entries = ", ".join(
        f'{field!r}: open("{value["b64"]}", "rb").read()'
        if isinstance(value, dict)
        else f"{field!r}: {value!r}"
        for field, value in record.items()
    )
    return f"{{{entries}}}"


def _example(task: Task, field: str) -> Any:
    for encoder in task.features.encoders:
        if isinstance(encoder, Images) and encoder.column == field:
            return {"b64": "image.png"}
        if isinstance(encoder, Categories) and field in encoder.columns:
            names = encoder.names_C[encoder.columns.index(field)]
            return names[0] if names else None
        if isinstance(encoder, Texts) and field in encoder.columns:
            return "some words"
        if isinstance(encoder, Numbers):
            for each in encoder.columns:
                if each.column == field and isinstance(each, Date):
                    return "2026-11-22T18:30:00"
                if each.column == field and each.kind == "boolean":
                    return True
                if each.column == field and isinstance(each, Vector):
                    return [0.0] * len(each.places)
                if each.column == field and isinstance(each, LabelSet):
                    return list(each.labels[:2])
                if each.column == field:
                    return float(f"{encoder.mean_F[encoder.names.index(field)]:.3g}")
    (spec,) = (spec for spec in task.features.fields if spec.name == field)
    sizes = [2 if size == FREE else size for size in spec.shape]
    return "…" if spec.datatype == "BYTES" else np.zeros(sizes).tolist()


def curl_body(record: Mapping[str, Any]) -> str:
    """Return the record as a shell-quoted JSON body for curl; the shell inserts the images."""
    words = shlex.quote(json.dumps({"instances": [record]}, ensure_ascii=False))
    for value in record.values():
        if isinstance(value, dict):
            file = value["b64"]
            words = words.replace(f'"b64": "{file}"', f'"b64": "\'"$(base64 -w0 {file})"\'"')
    return words
