"""Order of samples: a pure function of seed, epoch and step, independent of the workers."""

import numpy as np


def num_steps(num_samples: int, batch_size: int) -> int:
    """Return the steps per epoch. Batch sizes differ by at most one, so no sample is left over."""
    return max(1, round(num_samples / batch_size))


def epoch_batches(seed: int, epoch: int, num_samples: int, batch_size: int) -> list[np.ndarray]:
    """Return the epoch's global batches of sample ids, int64 [B] each; every id occurs once."""
    order = random_stream(seed, epoch, "order").permutation(num_samples)
    return np.array_split(order, num_steps(num_samples, batch_size))


def smallest_batch(num_samples: int, batch_size: int) -> int:
    """Return the number of samples in the smallest batch of an epoch."""
    return num_samples // num_steps(num_samples, batch_size)


def split_micro_batches(batch: np.ndarray, num_micro_batches: int) -> list[np.ndarray]:
    """Split a global batch, int64 [B], into micro-batches whose sizes differ by at most one."""
    return np.array_split(batch, num_micro_batches)


def random_stream(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return an independent generator for each seed, epoch and purpose (its first 8 bytes)."""
    words = np.frombuffer(purpose.encode().ljust(8)[:8], dtype=np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, *words])))
