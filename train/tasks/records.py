"""Records as a user has them, arrays as a net takes them, and what describes the arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = Mapping[str, Any]
Arrays = dict[str, np.ndarray]

# Datatypes of the Open Inference Protocol; BYTES has no fixed item size.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BYTES": np.dtype(object),
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


class InvalidRecord(ValueError):
    """A record that cannot be encoded. The message names the field, what came and what to send."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, datatype and shape of one tensor, without the batch dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.datatype]


def stack(rows: Sequence[Arrays]) -> Arrays:
    """Stack the arrays of N records along a new first dimension."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def concatenate(batches: Sequence[Arrays]) -> Arrays:
    """Join batches along their first dimension; a single batch is returned as it is."""
    if len(batches) == 1:
        return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def num_rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))
