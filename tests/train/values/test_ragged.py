"""Rows of different lengths, compared with lists of numpy arrays."""

import numpy as np
import pytest

from train.values import ragged
from train.values.ragged import Ragged
from train.values.records import TensorSpec, concatenate


def make(rng, *lengths, width=()):
    """Return rows of nonzero values and the Ragged array of them."""
    rows = [rng.integers(1, 9, (length, *width)).astype(np.int32) for length in lengths]
    values_T = np.concatenate(rows) if rows else np.empty((0, *width), np.int32)
    return rows, Ragged(values_T, np.cumsum([0, *lengths]))


def padded(rows, most):
    return np.stack([np.pad(r, [(0, most - len(r)), *[(0, 0)] * (r.ndim - 1)]) for r in rows])


@pytest.mark.parametrize("width", [(), (3,)])
def test_rows_are_padded_to_the_longest_of_those_chosen(rng, width):
    rows, stored = make(rng, 3, 0, 5, 1, width=width)
    assert len(stored) == 4
    np.testing.assert_array_equal(stored[:], padded(rows, 5))
    np.testing.assert_array_equal(stored[:2], padded(rows[:2], 3))
    np.testing.assert_array_equal(stored[np.array([3, 0])], padded([rows[3], rows[0]], 3))
    np.testing.assert_array_equal(stored[2], rows[2])
    np.testing.assert_array_equal(stored[-1], rows[3])
    assert stored[1:2].shape == (1, 1, *width), "no values still take one position"
    assert stored[np.array([], int)].shape == (0, 1, *width)
    assert stored.lengths_N.tolist() == [3, 0, 5, 1]
    with pytest.raises(IndexError):
        stored[4]


@pytest.mark.parametrize("width", [(), (3,)])
def test_padding_is_found_again(rng, width):
    rows, stored = make(rng, 3, 0, 5, 1, width=width)
    dense = np.pad(stored[:], [(0, 0), (0, 2), *[(0, 0)] * len(width)])
    assert ragged.row_lengths(dense).tolist() == [3, 0, 5, 1]
    assert ragged.trim(dense).shape[1] == 5
    again = Ragged.of(dense)
    np.testing.assert_array_equal(again.values_T, stored.values_T)
    np.testing.assert_array_equal(again.offsets, stored.offsets)
    few = stored.take(np.array([2, 2, 1]))
    np.testing.assert_array_equal(few[:], padded([rows[2], rows[2], rows[1]], 5))


def test_a_zero_inside_a_row_is_a_value():
    dense = np.array([[0, 7, 0, 0], [0, 0, 0, 0]])
    assert ragged.row_lengths(dense).tolist() == [2, 0]
    np.testing.assert_array_equal(Ragged.of(dense)[:], [[0, 7], [0, 0]])


@pytest.mark.parametrize(
    "offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [], [0, 4], [[0, 3]]], ids=lambda o: str(o)
)
def test_offsets_that_disagree_with_the_values_are_refused(offsets):
    with pytest.raises(ValueError, match="do not fit the 3 values"):
        Ragged(np.arange(3), np.array(offsets, np.int64))


def test_batches_of_different_lengths_are_joined():
    one, other = np.array([[1, 2]]), np.array([[3], [4]])
    joined = concatenate([{"x": one, "y": np.ones(1)}, {"x": other, "y": np.zeros(2)}])
    assert joined["x"].tolist() == [[1, 2], [3, 0], [4, 0]]
    assert joined["y"].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="broadcast"):
        concatenate([{"x": np.ones((1, 2, 3))}, {"x": np.ones((1, 4, 5))}])


def test_order_by_length_and_back(rng):
    rows, stored = make(rng, 3, 0, 5, 1)
    order = ragged.by_length({"x": stored, "y": np.arange(4)})
    assert order.tolist() == [1, 3, 0, 2]
    assert ragged.in_place(np.arange(4)[order], order).tolist() == [0, 1, 2, 3]
    assert ragged.by_length({"y": np.arange(4)}) is None
    assert ragged.lengths_of({"x": stored, "z": stored}).tolist() == [6, 0, 10, 2]
    taken = ragged.take({"x": stored, "y": np.arange(4)}, slice(2))
    np.testing.assert_array_equal(ragged.pad(taken)["x"], padded(rows[:2], 3))


def test_an_empty_array_of_a_free_length_can_be_made():
    spec = TensorSpec("x", "INT32", (ragged.FREE, 2))
    assert spec.ragged
    assert spec.empty().shape == (0, 1, 2)
    assert not TensorSpec("x", "INT32", (2,)).ragged
