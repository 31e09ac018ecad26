"""Arrays whose rows have different lengths.

A tensor may leave the first dimension of its records free, as lists of tokens do. Stored, its rows
follow each other; in a batch they are padded with 0 to the longest row, so 0 must mean "nothing".
Shapes: N rows, L positions of the longest row, T positions of all rows.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

# Size of a free dimension in the shape of a tensor.
FREE = -1


class Ragged:
    """Rows of different lengths, in memory or memory-mapped.

    It is indexed like an array of shape [N, L, …]: slices and index arrays give a padded array
    whose L is the length of the longest chosen row, at least 1; an index gives a row as it is.
    """

    def __init__(self, values_T: np.ndarray, offsets: np.ndarray) -> None:
        """values_T: [T, …], the rows one after the other. offsets: int64 [N + 1], from 0 to T.

        Raises ValueError if the offsets do not fit the values.
        """
        if (
            offsets.ndim != 1
            or not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != len(values_T)
            or np.any(np.diff(offsets) < 0)
        ):
            raise ValueError(f"the offsets of the rows do not fit the {len(values_T)} values")
        self.values_T, self.offsets = values_T, offsets

    @classmethod
    def of(cls, padded: np.ndarray) -> Self:
        """Return the rows of an array [N, L, …] without their padding."""
        lengths_N = row_lengths(padded)
        inside_NL = np.arange(padded.shape[1]) < lengths_N[:, None]
        return cls(padded[inside_NL], np.concatenate([[0], np.cumsum(lengths_N)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def dtype(self) -> np.dtype:
        return self.values_T.dtype

    @property
    def lengths_N(self) -> np.ndarray:
        """Number of positions of each row, int64 [N]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Self:
        """Return rows by their indices, int64 [M], without padding."""
        lengths = self.lengths_N[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Indices of all positions of the rows.
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return type(self)(self.values_T[places], offsets)

    def __getitem__(self, rows: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            if not -len(self) <= rows < len(self):  # as arrays do, which ends iteration
                raise IndexError(f"row {rows} of {len(self)}")
            rows = int(rows) % len(self)
            return self.values_T[self.offsets[rows] : self.offsets[rows + 1]]
        chosen = np.arange(len(self))[rows]
        starts, ends = self.offsets[chosen], self.offsets[chosen + 1]
        most = max(int((ends - starts).max(initial=0)), 1)
        padded = np.zeros((len(chosen), most, *self.values_T.shape[1:]), self.dtype)
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            padded[row, : end - start] = self.values_T[start:end]
        return padded


# Records by input: arrays [N, …], or rows of different lengths.
StoredArrays = Mapping[str, np.ndarray | Ragged]


def row_lengths(padded: np.ndarray) -> np.ndarray:
    """Return the number of positions before the padding of each row, int64 [N].

    padded: [N, L, …]. The padding begins after the last position that is not 0.
    """
    used = padded != 0
    used_NL = used.any(axis=tuple(range(2, used.ndim))) if used.ndim > 2 else used
    backwards_N = used_NL[:, ::-1].argmax(axis=1)
    return np.where(used_NL.any(axis=1), padded.shape[1] - backwards_N, 0)


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays [N, …]; arrays [N, L, …] of different lengths are padded to the longest.

    Raises ValueError if other dimensions differ.
    """
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    most = max(array.shape[1] for array in arrays)
    count = sum(map(len, arrays))
    found = np.zeros((count, most, *arrays[0].shape[2:]), arrays[0].dtype)
    start = 0
    for array in arrays:
        found[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return found


def trim(padded: np.ndarray) -> np.ndarray:
    """Return an array [N, L, …] without positions that are padding in every row; at least one."""
    most = max(int(row_lengths(padded).max(initial=0)), 1)
    return padded[:, :most]


def lengths_of(arrays: StoredArrays) -> np.ndarray | None:
    """Return the positions of each record in all its ragged inputs, int64 [N]; None if none is."""
    lengths = [array.lengths_N for array in arrays.values() if isinstance(array, Ragged)]
    return sum(lengths[1:], lengths[0]) if lengths else None


def take(arrays: StoredArrays, ids: np.ndarray | slice) -> StoredArrays:
    """Return a copy of some records by their indices, int64 [M]; ragged inputs stay ragged."""
    return {
        name: array.take(np.arange(len(array))[ids])
        if isinstance(array, Ragged)
        else np.array(array[ids])
        for name, array in arrays.items()
    }


def pad(arrays: StoredArrays) -> dict[str, np.ndarray]:
    """Return all records as arrays [N, …], the ragged inputs padded to the longest record."""
    return {name: np.asarray(array[:]) for name, array in arrays.items()}


def by_length(arrays: StoredArrays) -> np.ndarray | None:
    """Return the indices of the records, int64 [N], shortest first; None if none is ragged.

    Batches of neighbours in this order contain little padding.
    """
    lengths_N = lengths_of(arrays)
    return None if lengths_N is None else np.argsort(lengths_N, kind="stable")


def in_place(ordered: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Return rows, [N, …], in their first order, from which `by_length` took them by `order`."""
    if order is None:
        return ordered
    found = np.empty_like(ordered)
    found[order] = ordered
    return found
