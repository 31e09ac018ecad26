"""Baseline: statistics of the training data, kept in the bundle to tell drift from."""

from typing import Any

import numpy as np

from train.data.shards import Shards, batches
from train.tasks import ClassTarget

NUM_BINS = 16
BATCH_SIZE = 1024


def baseline(shards: Shards) -> dict[str, Any]:
    """Return statistics of the training split.

    For an image, over images: mean and deviation of each channel's mean (0..255), and the share
    of images in each of 16 equal bins of brightness. For a class target: the share of each class.
    """
    inputs, targets_N = shards.open("train")
    target = shards.task.target
    result: dict[str, Any] = {"num_records": len(targets_N), "inputs": {}}
    for name, images_NHWC in inputs.items():
        parts = batches(len(images_NHWC), BATCH_SIZE)
        means_NC = np.concatenate([images_NHWC[part].mean(axis=(1, 2)) for part in parts])
        counts, edges = np.histogram(means_NC.mean(axis=1), bins=NUM_BINS, range=(0, 255))
        result["inputs"][name] = {
            "channel_mean": means_NC.mean(axis=0).tolist(),
            "channel_std": means_NC.std(axis=0).tolist(),
            "brightness": {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()},
        }
    if isinstance(target, ClassTarget):
        counts = np.bincount(targets_N, minlength=len(target.classes))
        shares = dict(zip(target.classes, (counts / counts.sum()).tolist(), strict=True))
        result["target"] = {"shares": shares}
    return result
