"""Quantities of records and predictions that drift detection monitors, as histograms.

The same code counts the baseline in training and the windows in serving. Like the network, it works
on encoded arrays. Shapes: N records, B counts of a histogram, D dimensions of an embedding.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from train.tasks import (
    Arrays,
    Categories,
    ClassTarget,
    Encoder,
    Images,
    NamedTarget,
    Numbers,
    Task,
    Texts,
    ValueTarget,
)
from train.tasks.columns.categorical import FIRST
from train.values.ragged import row_lengths

VERSION = 2
NUM_BINS = 16
# Number of names with their own bin; rarer names share one.
MAX_NAMES, MAX_CLASSES = 20, 256
# Number of dimensions of an embedding that are monitored.
MAX_DIMENSIONS = 64
UNSEEN_NAME, MISSING_NAME, OTHER_NAME = "(unseen)", "(missing)", "(others)"
# The edges are dense near 0 and 1, where most probabilities are.
PROBABILITY_EDGES = (
    *(0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4),
    *(0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99, 1.0),
)
# Weights of red, green and blue in grey: ITU-R BT.601, as in Pillow.
LUMA = (0.299, 0.587, 0.114)
CHANNELS = ("red", "green", "blue")

Kind = Literal["number", "category", "embedding"]


@dataclass(frozen=True)
class Quantity:
    """A monitored quantity, with the histogram of its values over held-out records.

    edges: edges of the bins of a number, or of each dimension of an embedding; the last bin
    includes its upper edge. labels: one for each bin of a category.
    counts: int64; for a number [B] = missing, below the first edge, each bin, above the last edge;
    for a category [B], one for each label; for an embedding [D, B], each row as for a number.
    """

    kind: Kind
    of: Literal["inputs", "outputs"]
    counts: np.ndarray
    edges: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()

    def count(self, values: np.ndarray) -> np.ndarray:
        """Return the histogram of values, int64 and with the shape of `counts`.

        values: float [N] for a number, int [N] for a category, float [N, D] for an embedding.
        """
        if self.kind == "embedding":
            counted = [self._count(column, self.counts.shape[1]) for column in values.T]
            return np.array(counted, np.int64)
        return self._count(values, len(self.counts))

    def _count(self, values_N: np.ndarray, size: int) -> np.ndarray:
        if self.kind == "category":
            return np.bincount(np.minimum(values_N, size - 1), minlength=size)
        edges = np.array(self.edges)
        bins_N = np.searchsorted(edges, values_N, side="right") + 1
        bins_N[values_N == edges[-1]] = len(edges)
        bins_N[np.isnan(values_N)] = 0
        return np.bincount(bins_N, minlength=size)

    def to_dict(self) -> dict[str, Any]:
        bins = {"labels": list(self.labels)} if self.labels else {"edges": list(self.edges)}
        return {"kind": self.kind, "of": self.of, **bins, "counts": self.counts.tolist()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(
            state["kind"],
            state["of"],
            np.array(state["counts"], np.int64),
            tuple(state.get("edges", ())),
            tuple(state.get("labels", ())),
        )


def read_baseline(content: bytes) -> dict[str, Quantity]:
    """Return the quantities in a bundle's baseline.json; empty if it has another version."""
    baseline = json.loads(content)
    if baseline.get("version") != VERSION:
        return {}
    return {name: Quantity.from_dict(state) for name, state in baseline["quantities"].items()}


@dataclass(frozen=True)
class QuantityValues:
    """Values of one quantity of N records; for dtype and shape see `Quantity.count`.

    labels: the label of each code of a category.
    """

    kind: Kind
    of: Literal["inputs", "outputs"]
    values: np.ndarray
    labels: tuple[str, ...] = field(default=(), compare=False)


def measure_quantities(
    task: Task, inputs: Arrays, predictions: Arrays | None
) -> dict[str, QuantityValues]:
    """Return the values of all quantities of N records, by name.

    inputs: encoded records, [N, …] each. predictions: decoded outputs, [N, …] each, or None.
    """
    measured: dict[str, QuantityValues] = {}
    for encoder in task.features.encoders:
        for name, kind, values, labels in _of_inputs(encoder, inputs):
            measured[name] = QuantityValues(kind, "inputs", values, labels)
    found = _of_predictions(task, predictions) if predictions is not None else ()
    for name, kind, values, labels in found:
        # A column may have the same name as a quantity of the predictions.
        name = name if name not in measured else f"output.{name}"
        measured[name] = QuantityValues(kind, "outputs", values, labels)
    return measured


Found = Iterator[tuple[str, Kind, np.ndarray, tuple[str, ...]]]


def _of_inputs(encoder: Encoder, inputs: Arrays) -> Found:
    if isinstance(encoder, Images):
        images_NHWC = inputs[encoder.column]
        heights_N = row_lengths(images_NHWC) if encoder.has_free_height else None
        yield from _of_images(encoder.column, images_NHWC, heights_N)
    elif isinstance(encoder, Numbers):
        # Back to the units of the records, in float64.
        raw_NF = inputs[encoder.kind] * np.array(encoder.scale_F) + np.array(encoder.mean_F)
        for name, values_N in zip(encoder.names, raw_NF.T, strict=True):
            # Dates always increase, which is not drift.
            if not name.endswith(".trend"):
                yield name, "number", values_N, ()
    elif isinstance(encoder, Categories):
        columns = zip(encoder.columns, encoder.names_C, inputs[encoder.kind].T, strict=True)
        for name, names, codes_N in columns:
            known = (UNSEEN_NAME, MISSING_NAME, *names)
            yield name, "category", codes_N, _shortened(known, FIRST + MAX_NAMES)
    elif isinstance(encoder, Texts):
        tokens_NL = inputs[encoder.kind]
        lengths_N = (tokens_NL > 0).sum(axis=1)
        name = "+".join(encoder.columns)
        yield f"{name}.length", "number", lengths_N.astype(float), ()
        if (unknown := encoder.unknown) is not None:
            unknown_N = (tokens_NL == unknown).sum(axis=1)
            yield f"{name}.unknown", "number", unknown_N / np.maximum(lengths_N, 1), ()
    else:
        for spec in encoder.inputs:
            array = inputs[spec.name]
            if spec.ragged:
                yield f"{spec.name}.length", "number", row_lengths(array).astype(float), ()
            else:
                yield spec.name, "embedding", _embedding(array.astype(float)), ()


def _of_images(column: str, images_NHWC: np.ndarray, heights_N: np.ndarray | None) -> Found:
    """heights_N: int64 [N] of images that differ in height; the rows below are padding."""
    if heights_N is None:
        found = _of_pixels(images_NHWC)
    else:
        # Each image by itself, without its padding.
        each = [
            _of_pixels(image[None, : max(height, 1)])
            for image, height in zip(images_NHWC, heights_N.tolist(), strict=True)
        ]
        found = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
        found["height"] = heights_N.astype(float)
    for name, values_N in found.items():
        yield f"{column}.{name}", "number", values_N, ()


def _of_pixels(images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    pixels_NHWC = images_NHWC.astype(np.float32)
    means_NC = pixels_NHWC.mean(axis=(1, 2))
    grey_NHW = pixels_NHWC @ np.array(LUMA, np.float32) if means_NC.shape[1] == 3 else pixels_NHWC
    grey_NHW = grey_NHW.reshape(pixels_NHWC.shape[:3])
    # Detail: blur and compression lower it, noise raises it.
    across_N, down_N = (
        np.abs(np.diff(grey_NHW, axis=axis)).sum(axis=(1, 2)) / grey_NHW[0].size for axis in (1, 2)
    )
    found = {
        "brightness": grey_NHW.mean(axis=(1, 2)),
        "contrast": grey_NHW.std(axis=(1, 2)),
        "detail": across_N + down_N,
    }
    if means_NC.shape[1] == len(CHANNELS):
        found |= dict(zip(CHANNELS, means_NC.T, strict=True))
    return found


def _of_predictions(task: Task, predictions: Arrays) -> Found:
    target = task.target
    if isinstance(target, NamedTarget):
        probabilities_NK = predictions["probabilities"].astype(float)
        if isinstance(target, ClassTarget):
            chosen_N = target.choose(predictions["probabilities"])
            yield "prediction", "category", chosen_N, _shortened(target.classes, MAX_CLASSES)
            yield "confidence", "number", probabilities_NK.max(axis=1), ()
        yield "probabilities", "embedding", _embedding(probabilities_NK), ()
    elif isinstance(target, ValueTarget):
        yield "prediction", "number", predictions["value"].astype(float), ()


def _embedding(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)[:, :MAX_DIMENSIONS]


def _shortened(labels: tuple[str, ...], most: int) -> tuple[str, ...]:
    return labels if len(labels) <= most else (*labels[: most - 1], OTHER_NAME)


def bin_edges(measured: QuantityValues, name: str) -> tuple[float, ...]:
    """Return the edges of the bins of a quantity.

    Up to NUM_BINS distinct values have one bin each; otherwise the bins hold about equally many
    values.
    """
    if name == "probabilities":
        return PROBABILITY_EDGES
    values = measured.values[np.isfinite(measured.values)]
    if not len(values):
        return (0.0, 0.0)
    distinct = np.unique(values)
    if len(distinct) <= NUM_BINS:
        between = (distinct[1:] + distinct[:-1]) / 2
        return (float(distinct[0]), *between.tolist(), float(distinct[-1]))
    return tuple(np.unique(np.quantile(values, np.linspace(0, 1, NUM_BINS + 1))).tolist())
