"""Writing the arrays of the splits to disk, block by block."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.data.preprocess import EncodedBlock
from train.data.splits import NAMES, TRAIN, VALID
from train.tasks import Task
from train.values.ragged import Ragged


def input_files(number: int) -> tuple[str, str]:
    """Return the names of the files of an input's values and of the offsets of its rows."""
    return f"input-{number}.npy", f"input-{number}-offsets.npy"


class SplitWriter:
    """Context manager that appends encoded records to the .npy files of their splits.

    Rows of different lengths take two files: their values, and their offsets in them.

    train_on_valid: write the records of the validation split to the training split too.
    """

    def __init__(self, folder: Path, task: Task, train_on_valid: bool = False) -> None:
        self._members = {TRAIN: [TRAIN, VALID] if train_on_valid else [TRAIN]}
        self.counts = dict.fromkeys(NAMES, 0)
        self._shapes: dict[Path, tuple[np.dtype, tuple[int, ...]]] = {}
        self._lengths: dict[Path, int] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._digests: dict[Path, Any] = {}
        self._folder = folder
        self._names = [spec.name for spec in task.features.inputs]

    def __enter__(self) -> "SplitWriter":
        for name in NAMES:
            (self._folder / name).mkdir()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for path, file in self._files.items():
            file.seek(0)
            self._write_header(path)
            file.close()

    @property
    def digest(self) -> str:
        """SHA-256 of all arrays written, in hex."""
        return self._digest(sorted(self._digests))

    def digest_of(self, name: str) -> str:
        """Return the SHA-256 of the arrays of one split, in hex."""
        return self._digest([path for path in sorted(self._digests) if path.parent.name == name])

    def _digest(self, paths: Iterable[Path]) -> str:
        parts = [self._digests[path].hexdigest() for path in paths]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def add(self, encoded: EncodedBlock, codes_N: np.ndarray) -> None:
        """Append records to their splits. codes_N: int8 [N], the split of each, or NOWHERE."""
        for code, name in enumerate(NAMES):
            chosen_N = np.isin(codes_N, self._members.get(code, [code]))
            if not chosen_N.any():
                continue
            folder = self._folder / name
            for number, input_name in enumerate(self._names):
                array = encoded.inputs[input_name]
                values, offsets = input_files(number)
                if isinstance(array, Ragged):
                    rows = array.take(np.flatnonzero(chosen_N))
                    start = self._lengths.get(folder / values, 0)
                    self._append(folder / values, rows.values_T)
                    known = (folder / offsets) in self._files  # its last offset is the first here
                    self._append(folder / offsets, start + rows.offsets[int(known) :])
                else:
                    self._append(folder / values, array[chosen_N])
            self._append(folder / "target.npy", encoded.targets_N[chosen_N])
            self.counts[name] += int(chosen_N.sum())

    def _append(self, path: Path, array: np.ndarray) -> None:
        if path not in self._files:
            self._files[path] = path.open("w+b")
            self._shapes[path] = array.dtype, array.shape[1:]
            self._digests[path] = hashlib.sha256()
            self._lengths[path] = 0
            self._write_header(path)
        data = np.ascontiguousarray(array)
        self._files[path].write(data.data if data.size else b"")
        self._digests[path].update(data)
        self._lengths[path] += len(data)

    def _write_header(self, path: Path) -> None:
        # numpy pads the header so that it keeps its length when the count grows, so __exit__ can
        # overwrite it.
        dtype, shape = self._shapes[path]
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (self._lengths[path], *shape),
        }
        np.lib.format.write_array_header_1_0(self._files[path], header)
