"""Records to measure activation ranges on. Shapes: N records, K outputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from train.config import Config
from train.data import batch_sampler
from train.data.dataset import batch_slices
from train.tasks import Arrays, ClassTarget
from train.values.ragged import StoredArrays, pad, take

# Records with extreme outputs to find, and the number of records that are searched for them.
EXTREME_RECORDS, MOST_SEARCHED = 64, 50_000

# Input bytes per batch of the search; activations need hundreds of times as much memory.
SEARCH_BYTES = 2**20


def spread(targets_N: np.ndarray, config: Config, target: Any) -> np.ndarray:
    """Return shuffled indices [N] of training records that begin with one record of each class.

    targets_N: class indices [N], or other encoded targets, [N] or [N, K].
    """
    ids = batch_sampler.random_stream(config.seed, 0, "calib").permutation(len(targets_N))
    if not isinstance(target, ClassTarget):
        return ids
    first = np.unique(targets_N[ids], return_index=True)[1]
    return np.concatenate([ids[first], np.delete(ids, first)])


@torch.inference_mode()
def find_extremes(
    run: Callable[[Arrays], np.ndarray], inputs: StoredArrays, ids: np.ndarray
) -> np.ndarray:
    """Return indices of the records whose outputs are farthest from the mean, farthest first.

    run: encoded arrays [N, ...] by name → outputs [N, K]. Numbers are unbounded, so ranges measured
    without the largest ones would clip them. Returns no indices if all inputs are bounded.
    """
    if not any(np.issubdtype(array.dtype, np.floating) for array in inputs.values()):
        return ids[:0]
    row_bytes = max(sum(array[0].nbytes for array in inputs.values()), 1)
    size = int(np.clip(SEARCH_BYTES // row_bytes, 1, 1000))
    ids = ids[: min(MOST_SEARCHED, 50 * size)]
    parts = [run(pad(take(inputs, ids[part]))) for part in batch_slices(len(ids), size)]
    outputs_NK = np.concatenate(parts)
    deviations_NK = np.abs(outputs_NK - outputs_NK.mean(axis=0)) / (outputs_NK.std(axis=0) + 1e-12)
    return ids[np.argsort(-deviations_NK.max(axis=1), kind="stable")[:EXTREME_RECORDS]]
