"""The duration of a batch as a function of its rows and their length, fitted to measurements.

Shapes: P measured batches, C terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from train.bundle.manifest import Timing


@dataclass(frozen=True)
class CostModel:
    """Seconds of a batch: a sum of terms with coefficients of at least 0.

    The terms of R rows that are padded to L positions are 1, R, R·L and R·L²: the cost of a call,
    of a row, of a position (linear layers) and of a pair of positions (attention).
    """

    coefficients_C: tuple[float, ...]

    @classmethod
    def fit(cls, rows: Sequence[int], lengths: Sequence[int], seconds: Sequence[float]) -> Self:
        """Return the model with the smallest squared relative error at P measured batches.

        rows, lengths: size of each batch. seconds: its duration. P ≥ 1.
        """
        from scipy.optimize import nnls  # here, because the import takes a fifth of a second

        terms_PC = _terms(np.array(rows, float), np.array(lengths, float))
        relative_PC = terms_PC / np.array(seconds)[:, None]
        # Terms differ by orders of magnitude.
        scale_C = np.linalg.norm(relative_PC, axis=0)
        found_C, _ = nnls(relative_PC / scale_C, np.ones(len(terms_PC)))
        return cls(tuple((found_C / scale_C).tolist()))

    def seconds(self, rows: Any, length: Any) -> Any:
        """Return the duration of a batch of `rows` rows that are padded to `length` positions.

        Also for arrays of rows and lengths, whose shapes can be broadcast.
        """
        call, row, position, pair = self.coefficients_C
        return call + rows * (row + length * (position + length * pair))

    def errors(
        self, rows: Sequence[int], lengths: Sequence[int], seconds: Sequence[float]
    ) -> np.ndarray:
        """Return the relative errors for P measured batches, float64 [P], each at least 0."""
        expected_P = _terms(np.array(rows, float), np.array(lengths, float)) @ self.coefficients_C
        return np.abs(expected_P / np.array(seconds) - 1)


def _terms(rows_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
    positions_P = rows_P * lengths_P
    return np.stack([np.ones_like(rows_P), rows_P, positions_P, positions_P * lengths_P], axis=1)


def fit_timings(timings: Sequence[Timing]) -> CostModel:
    """Return the model of measured batches whose records have a length."""
    return CostModel.fit(*_columns(timings))


def held_out_errors(timings: Sequence[Timing]) -> np.ndarray:
    """Return the relative error at each measured size of a model fitted to the others, [P]."""
    return np.concatenate(
        [
            fit_timings([*timings[:place], *timings[place + 1 :]]).errors(*_columns([timing]))
            for place, timing in enumerate(timings)
        ]
    )


def _columns(timings: Sequence[Timing]) -> tuple[list[int], list[int], list[float]]:
    return (
        [timing.batch_size for timing in timings],
        [timing.length or 0 for timing in timings],
        [timing.p50_ms / 1e3 for timing in timings],
    )
