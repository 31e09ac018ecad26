"""What a model can be used for and how, for its card: its limits, and an example record."""

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
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.scalars import Date

# A class with fewer test records has a recall that is mostly chance.
FEW_RECORDS = 30
# Names in a sentence; of more, the first ones.
MAX_NAMES = 8


def limitations(manifest: Manifest, task: Task, classes: Sequence[ClassMetrics]) -> Iterator[str]:
    """Sentences on what the model cannot do.

    classes: its metrics of each class on the test split; none for values.
    """
    test = manifest.data["test"]
    yield (
        f"All figures are of {test['num_records']:,} records of {test['source']}. Of records of "
        "another origin or another time they say nothing: compare them with feedback."
    )
    if manifest.config.get("data", {}).get("train_on_valid"):
        yield "It was trained on the validation records too, so that their figures are too good."
    few = [each.name for each in classes if each.support < FEW_RECORDS]
    if few:
        names = ", ".join(few[:MAX_NAMES]) + "…" * (len(few) > MAX_NAMES)
        yield f"Too few test records (less than {FEW_RECORDS}) to know it of: {names}."
    if isinstance(task.target, NamedTarget) and not isinstance(task.target, LabelsTarget):
        yield (
            f"It always answers one of its {len(task.target.classes)} classes, also for a record "
            "that is of none."
        )
    elif isinstance(task.target, ValueTarget):
        yield "It gives a value without an interval, and outside of the values it learned from too."
    for encoder in task.features.encoders:
        if isinstance(encoder, Images):
            height, width, channels = encoder.shape_HWC
            kind = "grey" if channels == 1 else "colour"
            yield (
                f"Every image ({encoder.column}) is brought to {height} × {width} pixels, {kind}; "
                "what is smaller than a pixel then is not seen."
            )
        elif isinstance(encoder, Texts):
            yield (
                f"Of {', '.join(encoder.columns)} together the first {encoder.max_tokens} tokens "
                "are read; words outside of the vocabulary are one word to it."
            )
        elif isinstance(encoder, Categories):
            yield f"All names that training never saw are one to it ({', '.join(encoder.columns)})."
    yield "The parts above are those of its columns; unfairness along others is not measured."


def example_record(task: Task) -> dict[str, Any]:
    """A record that the model accepts. An image: {"b64": the name of a file}."""
    return {field: _example(task, field) for field in task.features.columns}


def python_record(record: Mapping[str, Any]) -> str:
    """The record as a dictionary in Python; images are read from their files."""
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
    return "…" if spec.datatype == "BYTES" else np.zeros(spec.shape).tolist()


def curl_body(record: Mapping[str, Any]) -> str:
    """The record as the argument of curl, quoted for a shell; images are put in by the shell."""
    words = shlex.quote(json.dumps({"instances": [record]}, ensure_ascii=False))
    for value in record.values():
        if isinstance(value, dict):
            file = value["b64"]
            words = words.replace(f'"b64": "{file}"', f'"b64": "\'"$(base64 -w0 {file})"\'"')
    return words
