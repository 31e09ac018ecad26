"""Order of samples: a pure function of seed, epoch and step, independent of the workers.

Samples that differ in length, such as texts, are batched with others of about their length, so that
little is computed for padding.
"""

from typing import Literal

import numpy as np

# "samples": batches have equally many samples; "tokens": about equally many positions.
BatchBy = Literal["samples", "tokens"]

# Samples are sorted by length within windows of this many batches: the larger the window, the less
# padding, and the fewer samples may share a batch.
WINDOW_BATCHES = 50
# A longer sample counts as this many times the mean length, so that no batch has very few samples.
MOST_COUNTED = 4


def num_steps(num_samples: int, batch_size: int) -> int:
    """Return the steps per epoch. Batch sizes differ by at most one, so no sample is left over."""
    return max(1, round(num_samples / batch_size))


def epoch_batches(
    seed: int,
    epoch: int,
    num_samples: int,
    batch_size: int,
    lengths_N: np.ndarray | None = None,
    by: BatchBy = "samples",
) -> list[np.ndarray]:
    """Return the epoch's global batches of sample ids, int64 [B] each; every id occurs once.

    lengths_N: number of positions of each sample, int64 [N]; None if all are equal. Samples are
    then shuffled, sorted by length within windows of WINDOW_BATCHES batches, and cut into batches,
    which are shuffled again. by: batches have equally many samples, or about equally many
    positions; either way an epoch has `num_steps` batches.
    """
    stream = random_stream(seed, epoch, "order")
    batches = np.array_split(stream.permutation(num_samples), num_steps(num_samples, batch_size))
    if lengths_N is None:
        return batches
    costs_N = _costs(lengths_N)
    sorted_batches: list[np.ndarray] = []
    for first in range(0, len(batches), WINDOW_BATCHES):
        group = batches[first : first + WINDOW_BATCHES]
        window = np.concatenate(group)
        window = window[np.argsort(lengths_N[window], kind="stable")]
        bounds = np.cumsum([len(batch) for batch in group])[:-1]
        if by == "tokens":
            bounds = _equal_bounds(costs_N[window], len(group))
        sorted_batches += np.split(window, bounds)
    return [sorted_batches[number] for number in stream.permutation(len(sorted_batches))]


def _costs(lengths_N: np.ndarray) -> np.ndarray:
    """Return what each sample counts in batches of equally many positions, int64 [N]."""
    most = max(int(MOST_COUNTED * lengths_N.mean()), 1)
    return np.clip(lengths_N, 1, most)


def _equal_bounds(costs_M: np.ndarray, parts: int) -> np.ndarray:
    """Return the bounds between parts of about equal cost, int64 [parts - 1]; none is empty."""
    total_M = np.cumsum(costs_M)
    shares = np.arange(1, parts) / parts
    bounds = np.searchsorted(total_M, shares * total_M[-1])
    steps = np.arange(1, parts)
    increasing = np.maximum.accumulate(np.maximum(bounds, steps) - steps) + steps
    return np.minimum(increasing, len(costs_M) - parts + steps)


def smallest_batch(
    num_samples: int,
    batch_size: int,
    lengths_N: np.ndarray | None = None,
    by: BatchBy = "samples",
) -> int:
    """Return the number of samples in the smallest batch of an epoch.

    lengths_N, by: as for `epoch_batches`. With equally many positions, epochs differ a little.
    """
    if lengths_N is None or by == "samples":
        return num_samples // num_steps(num_samples, batch_size)
    return min(map(len, epoch_batches(0, 0, num_samples, batch_size, lengths_N, by)))


def split_micro_batches(batch: np.ndarray, num_micro_batches: int) -> list[np.ndarray]:
    """Split a global batch, int64 [B], into micro-batches whose sizes differ by at most one."""
    return np.array_split(batch, num_micro_batches)


def random_stream(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return an independent generator for each seed, epoch and purpose (its first 8 bytes)."""
    words = np.frombuffer(purpose.encode().ljust(8)[:8], dtype=np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, *words])))
