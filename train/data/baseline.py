"""Baseline: statistics of the training data, kept in the bundle to tell drift from."""

from typing import Any

import numpy as np

from train.data.shards import Shards, batches
from train.tasks import Arrays, Categories, ClassTarget, Encoder, Images, Numbers, Texts

NUM_BINS = 16
BATCH_SIZE = 1024


def baseline(shards: Shards) -> dict[str, Any]:
    """Return statistics of the training split, by the name of the array they are of.

    For an image, over images: mean and deviation of each channel's mean (0..255), and the share
    of images in each of 16 equal bins of brightness. For each number: the edges of 16 bins that
    hold equally many records, and the share that is missing. For each category: the share of each
    code. For texts: the share of each number of tokens, in 16 equal bins. For a class target: the
    share of each class.
    """
    inputs, targets_N = shards.open("train")
    task = shards.task
    result: dict[str, Any] = {"num_records": len(targets_N), "inputs": {}}
    for encoder in task.features.encoders:
        result["inputs"] |= _of_inputs(encoder, inputs)
    if isinstance(task.target, ClassTarget):
        counts = np.bincount(targets_N, minlength=len(task.target.classes))
        shares = dict(zip(task.target.classes, (counts / counts.sum()).tolist(), strict=True))
        result["target"] = {"shares": shares}
    return result


def _of_inputs(encoder: Encoder, inputs: Arrays) -> dict[str, Any]:
    if isinstance(encoder, Images):
        return {encoder.column: _of_images(inputs[encoder.column])}
    if isinstance(encoder, Numbers):
        columns = inputs[encoder.kind].T
        return {
            name: _of_number(values) for name, values in zip(encoder.names, columns, strict=True)
        }
    if isinstance(encoder, Categories):
        columns = inputs[encoder.kind].T
        return {
            name: {"shares": (np.bincount(codes, minlength=size) / len(codes)).tolist()}
            for name, codes, size in zip(encoder.columns, columns, encoder.sizes, strict=True)
        }
    if isinstance(encoder, Texts):
        return {encoder.kind: _of_lengths(inputs[encoder.kind], encoder.max_tokens)}
    return {}


def _of_images(images_NHWC: np.ndarray) -> dict[str, Any]:
    parts = batches(len(images_NHWC), BATCH_SIZE)
    means_NC = np.concatenate([images_NHWC[part].mean(axis=(1, 2)) for part in parts])
    counts, edges = np.histogram(means_NC.mean(axis=1), bins=NUM_BINS, range=(0, 255))
    return {
        "channel_mean": means_NC.mean(axis=0).tolist(),
        "channel_std": means_NC.std(axis=0).tolist(),
        "brightness": {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()},
    }


def _of_number(values_N: np.ndarray) -> dict[str, Any]:
    known_N = values_N[~np.isnan(values_N)]
    edges = np.quantile(known_N, np.linspace(0, 1, NUM_BINS + 1)).tolist() if len(known_N) else []
    return {"edges": edges, "missing": 1 - len(known_N) / len(values_N)}


def _of_lengths(tokens_NL: np.ndarray, most: int) -> dict[str, Any]:
    parts = batches(len(tokens_NL), BATCH_SIZE)
    lengths_N = np.concatenate([(tokens_NL[part] > 0).sum(axis=1) for part in parts])
    counts, edges = np.histogram(lengths_N, bins=NUM_BINS, range=(0, most))
    return {"lengths": {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()}}
