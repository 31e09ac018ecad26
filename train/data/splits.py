"""Splits: which records train, which choose, which test. They never overlap."""

from dataclasses import dataclass

import numpy as np

from cluster.errors import UserError
from train.config import Data
from train.data import sources
from train.tasks import Record

MIN_TRAINING = 2


@dataclass(frozen=True)
class Split:
    """Records of one split and the row each had in its source."""

    url: str
    records: list[Record]
    rows: np.ndarray


def split(config: Data, columns: list[str]) -> dict[str, Split]:
    """Read the sources and return the splits train, valid and test.

    A split without a source of its own is taken from the training records at random, by
    `split_seed` alone, so that another run's seed leaves the splits as they are.
    """
    records = sources.read(config.train, columns)
    rows = np.random.Generator(np.random.Philox(config.split_seed)).permutation(len(records))
    splits = {}
    for name, url, fraction in (
        ("test", config.test, config.test_fraction),
        ("valid", config.valid, config.valid_fraction),
    ):
        if url is not None:
            given = sources.read(url, columns)
            splits[name] = Split(url, given, np.arange(len(given)))
        else:
            count = max(1, round(fraction * len(records)))
            taken, rows = np.sort(rows[:count]), rows[count:]
            splits[name] = Split(config.train, [records[row] for row in taken], taken)
    rest = np.sort(rows)
    if len(rest) < MIN_TRAINING:
        raise UserError(
            f"'{config.train}' has {len(records)} records, which leaves {len(rest)} to train on; "
            f"at least {MIN_TRAINING} are needed."
        )
    return {"train": Split(config.train, [records[row] for row in rest], rest), **splits}
