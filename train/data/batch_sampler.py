"""The order of samples: a pure function of seed, epoch and step, whatever the workers."""

import numpy as np


def num_steps(num_samples: int, batch_size: int) -> int:
    """Steps in an epoch. Batches are equal to within one sample, so none is left over."""
    return max(1, round(num_samples / batch_size))


def epoch_batches(seed: int, epoch: int, num_samples: int, batch_size: int) -> list[np.ndarray]:
    """Return the epoch's global batches: each sample id in exactly one of them."""
    order = random_stream(seed, epoch, "order").permutation(num_samples)
    return np.array_split(order, num_steps(num_samples, batch_size))


def smallest_batch(num_samples: int, batch_size: int) -> int:
    return num_samples // num_steps(num_samples, batch_size)


def split_micro_batches(batch: np.ndarray, num_micro_batches: int) -> list[np.ndarray]:
    """Divide a global batch into micro-batches whose sizes differ by one sample at most."""
    return np.array_split(batch, num_micro_batches)


def random_stream(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """A random stream of its own for each seed, epoch and purpose."""
    words = np.frombuffer(purpose.encode().ljust(8)[:8], dtype=np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, *words])))
