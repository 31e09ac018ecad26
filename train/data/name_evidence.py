"""Tests whether categorical columns are related to the target, alone or in pairs.

Shapes: N records, C columns, K target columns, R factors.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from train.data.fitting import target_numbers
from train.stats import association_p_value
from train.tasks import Categories, Columns, Task

# Columns with fewer names keep them: a model can overfit little on so few.
MANY_NAMES = 20
MAX_P = 0.05
# Pairs are formed from this many columns, those with the most names, and tested on this many
# target columns.
MOST_COLUMNS, MOST_TARGETS = 5, 3
# In standard errors: columns whose interaction gain exceeds this keep their names.
MIN_GAIN = 4.0
NUM_FACTORS, NUM_ROUNDS = 4, 12
# Shrinkage of factors and means towards zero, as a number of pseudo-records.
RIDGE = 3.0


def merge_noise(task: Task, sample: Columns, notes: Sequence[str]) -> tuple[Task, list[str]]:
    """Merge the names of columns with at least MANY_NAMES names that are unrelated to the target.

    A column is unrelated if neither its names alone nor their combination with another column's,
    as of users and items, predict the target. A model would memorise chance differences between
    such names. Returns the task and the notes, with one more for each merged column.
    sample: training records.
    """
    notes = list(notes)
    targets_N = target_numbers(task.target, sample[task.target.column])
    encoders = list(task.features.encoders)
    for place, encoder in enumerate(encoders):
        if not isinstance(encoder, Categories) or targets_N is None:
            continue
        codes_NC = encoder.encode(sample)[encoder.kind]
        many = {
            column: codes_N
            for column, names, codes_N in zip(
                encoder.columns, encoder.names_C, codes_NC.T, strict=True
            )
            if len(names) >= MANY_NAMES
        }
        p_values = {
            column: association_p_value(codes_N, targets_N) for column, codes_N in many.items()
        }
        merged = [column for column, p in p_values.items() if p > MAX_P]
        if merged and len(many) > 1:
            together = _say_more_together(many, targets_N)
            merged = [column for column in merged if column not in together]
        notes += [
            f"the {int(many[column].max()) - 1:,} names of '{column}' are merged because the "
            f"target differs between them by no more than chance (p = {p_values[column]:.2g}); "
            "give --data.merge_noise false to keep them"
            for column in merged
        ]
        encoders[place] = encoder.merge_names(merged)
    return replace(task, features=replace(task.features, encoders=tuple(encoders))), notes


def _say_more_together(codes: dict[str, np.ndarray], targets_N: np.ndarray) -> set[str]:
    """Return the columns whose names predict the target in combination with another column's."""
    columns = sorted(codes, key=lambda column: -int(codes[column].max()))[:MOST_COLUMNS]
    targets_NK = np.asarray(targets_N, np.float64).reshape(len(targets_N), -1)[:, :MOST_TARGETS]
    found: set[str] = set()
    for place, first in enumerate(columns):
        for second in columns[place + 1 :]:
            pair = codes[first], codes[second]
            if any(interaction_gain(*pair, column_N) > MIN_GAIN for column_N in targets_NK.T):
                found |= {first, second}
    return found


def interaction_gain(first_N: np.ndarray, second_N: np.ndarray, targets_N: np.ndarray) -> float:
    """Return the gain, in standard errors, of modelling interactions between two columns' names.

    Compares an additive model (a value per name) with one that adds products of R factors per
    name. Both are fitted to one half of the records and scored on the other, then the halves swap
    roles. Factors are fitted by alternating least squares: Koren, Bell and Volinsky, Matrix
    Factorization Techniques for Recommender Systems, 2009.

    first_N, second_N: integer codes [N] of the names, from 0. targets_N: float64 [N].
    """
    halves_N = np.random.Generator(np.random.Philox(0)).permutation(len(targets_N)) % 2
    gains_N = np.zeros(len(targets_N))
    sizes = int(first_N.max()) + 1, int(second_N.max()) + 1
    for half in (0, 1):
        learned, judged = np.flatnonzero(halves_N != half), np.flatnonzero(halves_N == half)
        base, rest_N = _additive(first_N, second_N, targets_N, learned, sizes)
        left_NR, right_NR = _factors(first_N[learned], second_N[learned], rest_N, sizes)
        products = (left_NR[first_N[judged]] * right_NR[second_N[judged]]).sum(axis=1)
        errors = targets_N[judged] - base[judged]
        gains_N[judged] = errors**2 - (errors - products) ** 2
    spread = float(gains_N.std())
    return float(gains_N.mean()) / spread * math.sqrt(len(gains_N)) if spread > 0 else 0.0


def _additive(
    first_N: np.ndarray,
    second_N: np.ndarray,
    targets_N: np.ndarray,
    learned: np.ndarray,
    sizes: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a value for each name to the `learned` records.

    Returns the predictions of all records [N], and the residuals of the learned ones.
    """
    mean = targets_N[learned].mean()
    parts = [np.zeros(size) for size in sizes]
    codes = first_N, second_N
    for _ in range(NUM_ROUNDS):
        for place, other in ((0, 1), (1, 0)):
            rest = targets_N[learned] - mean - parts[other][codes[other][learned]]
            own = codes[place][learned]
            counts = np.bincount(own, minlength=sizes[place])
            parts[place] = np.bincount(own, rest, minlength=sizes[place]) / (counts + RIDGE)
    base = mean + parts[0][first_N] + parts[1][second_N]
    return base, targets_N[learned] - base[learned]


def _factors(
    first_N: np.ndarray, second_N: np.ndarray, rest_N: np.ndarray, sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of two columns' names whose products approximate the residuals rest_N."""
    rng = np.random.Generator(np.random.Philox(1))
    factors: list[np.ndarray] = [rng.normal(0, 0.3, (size, NUM_FACTORS)) for size in sizes]
    codes = first_N, second_N
    ridge_RR = RIDGE * max(float(rest_N.var()), 1e-12) * np.eye(NUM_FACTORS)
    for _ in range(NUM_ROUNDS):
        for place, other in ((0, 1), (1, 0)):
            given_NR = factors[other][codes[other]]
            squares = np.zeros((sizes[place], NUM_FACTORS, NUM_FACTORS))
            np.add.at(squares, codes[place], given_NR[:, :, None] * given_NR[:, None, :])
            sums = np.zeros((sizes[place], NUM_FACTORS, 1))
            np.add.at(sums[:, :, 0], codes[place], given_NR * rest_N[:, None])
            factors[place] = np.linalg.solve(squares + ridge_RR, sums)[:, :, 0]
    return factors[0], factors[1]
