"""The order of samples that differ in length."""

import numpy as np
import pytest

from train.data import batch_sampler
from train.data.batch_sampler import epoch_batches


@pytest.fixture
def lengths_N(rng):
    """Lengths of 20,000 texts, about those of AG News."""
    return np.clip(rng.lognormal(3.8, 0.4, 20_000), 0, 256).astype(int)


def computed(batches, lengths_N):
    """Positions computed ÷ positions needed."""
    return sum(len(b) * max(lengths_N[b].max(), 1) for b in batches) / lengths_N.sum()


@pytest.mark.parametrize("by", ["samples", "tokens"])
@pytest.mark.parametrize(("count", "size"), [(20_000, 64), (63, 64), (97, 10), (1, 64), (5, 1)])
def test_every_sample_is_seen_once(lengths_N, by, count, size):
    few_N = lengths_N[:count]
    batches = epoch_batches(7, 3, count, size, few_N, by)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert len(batches) == batch_sampler.num_steps(count, size)
    assert min(map(len, batches)) >= 1


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_little_is_computed_for_padding(lengths_N, by):
    count = len(lengths_N)
    at_random = computed(epoch_batches(0, 0, count, 64), lengths_N)
    similar = computed(epoch_batches(0, 0, count, 64, lengths_N, by), lengths_N)
    assert at_random > 2
    assert similar < 1.06


def test_batches_have_equally_many_samples_or_tokens(lengths_N):
    count = len(lengths_N)
    by_samples = epoch_batches(0, 0, count, 64, lengths_N)
    assert {len(batch) for batch in by_samples} <= {63, 64, 65}
    by_tokens = epoch_batches(0, 0, count, 64, lengths_N, "tokens")
    sums = np.array([lengths_N[batch].sum() for batch in by_tokens])
    assert sums.std() / sums.mean() < 0.05
    assert np.mean([len(batch) for batch in by_tokens]) == pytest.approx(64, rel=0.01)
    smallest = batch_sampler.smallest_batch(count, 64, lengths_N, "tokens")
    assert smallest == min(map(len, by_tokens))
    assert smallest > 64 / batch_sampler.MOST_COUNTED - 2


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_order_is_a_function_of_seed_and_epoch(lengths_N, by):
    def ids(seed, epoch):
        return [b.tolist() for b in epoch_batches(seed, epoch, 3_000, 10, lengths_N[:3_000], by)]

    assert ids(1, 2) == ids(1, 2)
    assert ids(1, 2) != ids(1, 3)
    assert ids(1, 2) != ids(2, 2)


def test_short_and_long_batches_alternate_at_random(lengths_N):
    """The lengths of successive batches are not correlated, as they would be if sorted."""
    batches = epoch_batches(0, 0, len(lengths_N), 64, lengths_N)
    means = np.array([lengths_N[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_companions_change_from_epoch_to_epoch(lengths_N):
    def companions(epoch):
        batches = epoch_batches(0, epoch, len(lengths_N), 64, lengths_N)
        return set(next(batch for batch in batches if 0 in batch).tolist()) - {0}

    assert len(companions(0) & companions(1)) < 10
