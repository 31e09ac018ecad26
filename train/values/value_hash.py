"""Hashes of records by their values, independent of file, format and row.

Shapes: N records or values.
"""

import hashlib
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from train.values.names import TRUTHS, to_name
from train.values.records import Columns, is_file, is_missing

# Hash of a missing value: the bits of NaN.
MISSING = 0x7FF8000000000000
# float64 represents all integers up to this one exactly, but not all larger ones.
EXACT = 2**53
WHOLE = re.compile(r"[+-]?[0-9]+", re.ASCII)


def hash_columns(columns: Columns, names: Sequence[str], count: int) -> np.ndarray:
    """Return a hash of each of `count` records by its values in the columns `names`, uint64 [N].

    Equal values have equal hashes: 1, 1.0 and "1"; missing values of every type; images with the
    same bytes. The order of the columns does not matter.
    """
    hash_N = np.zeros(count, np.uint64)
    for name in names:
        hash_N += mix(hash_values(columns[name]) ^ hash_text(name))
    return mix(hash_N)


def hash_values(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return a hash of each value, uint64 [N].

    The hash of a number is its float64 bits; integers beyond 2^53 are hashed as text.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return _number_bits(values)
    known: dict[Any, int] = {}
    return np.fromiter((_hash_value(value, known) for value in values), np.uint64, len(values))


def mix(hash_N: np.ndarray) -> np.ndarray:
    """Return hashes, uint64 [N], in which each bit depends on all bits of the input.

    This is the finaliser of SplitMix64: Steele, Lea and Flood, Fast splittable pseudorandom number
    generators, OOPSLA 2014.
    """
    hash_N = hash_N + np.uint64(0x9E3779B97F4A7C15)
    hash_N = (hash_N ^ (hash_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash_N = (hash_N ^ (hash_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hash_N ^ (hash_N >> np.uint64(31))


def fractions(hash_N: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each hash, float64 [N], that depends on the seed."""
    mixed_N = mix(hash_N ^ hash_text(f"seed {seed}"))
    return (mixed_N >> np.uint64(11)).astype(np.float64) / 2**53


def hash_text(text: str) -> np.uint64:
    """Return a 64-bit hash of a text's UTF-8 bytes."""
    return _hash_bytes(text.encode())


def _hash_bytes(content: bytes) -> np.uint64:
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "big"))


def _number_bits(numbers_N: np.ndarray) -> np.ndarray:
    if numbers_N.dtype.kind == "b":
        return np.where(numbers_N, np.uint64(TRUE), np.uint64(FALSE))
    values_N = np.asarray(numbers_N, np.float64) + 0.0  # turns -0.0 into 0.0
    hash_N = np.where(np.isnan(values_N), np.uint64(MISSING), values_N.view(np.uint64))
    if numbers_N.dtype.kind in "iu":
        for row in np.flatnonzero(np.abs(values_N) > EXACT):
            hash_N[row] = _hash_scalar(int(numbers_N[row]))
    return hash_N


def _float_bits(value: float) -> int:
    return MISSING if value != value else int.from_bytes(struct.pack(">d", value + 0.0), "big")


def _hash_value(value: Any, known: dict[Any, int]) -> int:
    if value is True or value is False:
        return TRUE if value else FALSE
    if is_missing(value):
        return MISSING
    if isinstance(value, float):
        return _float_bits(value)
    if isinstance(value, str | int):
        # Cached, because most columns have few distinct values.
        found = known.get(value)
        if found is None:
            found = known[value] = _hash_scalar(value)
        return found
    if is_file(value):
        value = value["bytes"]
    if isinstance(value, bytes):
        return int(_hash_bytes(value))
    if isinstance(value, dict | list | tuple | np.ndarray):
        items = sorted(value.items()) if isinstance(value, dict) else list(value)
        return int(_hash_bytes(repr([_hash_value(item, known) for item in items]).encode()))
    return _hash_scalar(value)


def _hash_scalar(value: Any) -> int:
    name = to_name(value, "text")
    if name.lower() in TRUTHS:
        name = name.lower()
    elif WHOLE.fullmatch(name) and abs(int(name)) > EXACT:
        name = str(int(name))
    elif "_" not in name:
        with suppress(ValueError):
            return _float_bits(float(name))
    return int(hash_text(name))


TRUE, FALSE = int(hash_text("true")), int(hash_text("false"))
