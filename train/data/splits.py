"""Splits: which records train, which choose, which test. They never overlap."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import UserError
from train.config import Data
from train.data import batch_sampler, sources
from train.data.sources import RowBlock
from train.tasks import InvalidRecord
from train.tasks.numeric import Date, Number
from train.tasks.records import category_name, is_missing

MIN_TRAINING = 2
TRAIN, VALID, TEST, NOWHERE = 0, 1, 2, -1
NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitSource:
    """A source and the split that each of its rows is in.

    copies_N: how often each row is in it; once if None.
    """

    url: str
    blocks: list[RowBlock]
    codes_N: np.ndarray
    copies_N: np.ndarray | None = None

    def turns(self, rows_N: np.ndarray) -> Iterator[np.ndarray]:
        """The splits of some rows, once for each time that one of them is in it, else NOWHERE."""
        codes_N = self.codes_N[rows_N]
        copies_N = np.ones(len(rows_N)) if self.copies_N is None else self.copies_N[rows_N]
        for turn in range(int(copies_N.max(initial=0))):
            yield np.where(copies_N > turn, codes_N, NOWHERE)


def assign_splits(
    config: Data, opened: dict[str, list[RowBlock]], date_format: str | None = None
) -> list[SplitSource]:
    """Return the sources, those of the training records first.

    date_format: of the dates of `split_time`, ISO 8601 if None.
    opened: the blocks of `data.train` and, where given, of `data.valid`, `data.test` and
    `data.extra`. A split without a source of its own is taken from the training records: at random
    by `split_seed` alone, or by `split_key` all records of a key together, or by `split_time` the
    latest. Extra records are for training alone, and come last.
    """
    blocks = opened["train"]
    count = sum(block.num_rows for block in blocks)
    shares = (
        0.0 if config.valid else config.valid_fraction,
        0.0 if config.test else config.test_fraction,
    )
    if config.split_key is not None:
        codes_N = _by_key(_values(blocks, config.split_key), config.split_seed, shares)
    elif config.split_time is not None:
        codes_N = _by_order(_order_in_time(blocks, config.split_time, date_format), shares)
    else:
        order = np.random.Generator(np.random.Philox(config.split_seed)).permutation(count)
        codes_N = _by_order(order[::-1], shares)
    left = int(np.sum(codes_N == TRAIN))
    if left < MIN_TRAINING:
        raise UserError(
            f"'{config.train}' has {count} records, which leaves {left} to train on; "
            f"at least {MIN_TRAINING} are needed."
        )
    for code, share in ((VALID, shares[0]), (TEST, shares[1])):
        if share and not np.any(codes_N == code):
            raise UserError(
                f"no record of '{config.train}' falls into the {NAMES[code]} split; give "
                f"--data.{NAMES[code]} or a column with more different values."
            )
    parts = [SplitSource(config.train, blocks, codes_N)]
    for name, code in (("valid", VALID), ("test", TEST)):
        if name in opened:
            rows = sum(block.num_rows for block in opened[name])
            url = getattr(config, name)
            parts.append(SplitSource(url, opened[name], np.full(rows, code, np.int8)))
    if "extra" in opened:
        training = (TRAIN, VALID) if config.train_on_valid else (TRAIN,)
        num_training = sum(int(np.isin(part.codes_N, training).sum()) for part in parts)
        parts.append(_extra(config, opened["extra"], num_training))
    return parts


def _extra(config: Data, blocks: list[RowBlock], num_training: int) -> SplitSource:
    """Training records besides `num_training` others, as many copies of them as their share is."""
    assert config.extra is not None
    rows = wanted = sum(block.num_rows for block in blocks)
    if config.extra_fraction is not None:
        wanted = max(1, round(num_training * config.extra_fraction / (1 - config.extra_fraction)))
    times, left = divmod(wanted, rows)
    copies_N = np.full(rows, times)
    copies_N[
        batch_sampler.random_stream(config.split_seed, 0, "extra").permutation(rows)[:left]
    ] += 1
    return SplitSource(config.extra, blocks, np.full(rows, TRAIN, np.int8), copies_N)


def _by_order(order_N: np.ndarray, shares: tuple[float, float]) -> np.ndarray:
    """The last of `order_N` test, those before them choose, all others train."""
    valid_share, test_share = shares
    count = len(order_N)
    num_test = max(1, round(test_share * count)) if test_share else 0
    num_valid = max(1, round(valid_share * count)) if valid_share else 0
    codes_N = np.full(count, TRAIN, np.int8)
    codes_N[order_N[count - num_test :]] = TEST
    codes_N[order_N[max(count - num_test - num_valid, 0) : count - num_test]] = VALID
    return codes_N


def _by_key(values: Iterator[Any], seed: int, shares: tuple[float, float]) -> np.ndarray:
    """A record's split depends on its key alone, so that it stays when records are added."""
    valid_share, test_share = shares
    cache: dict[str, int] = {}

    def code(value: Any) -> int:
        key = "" if is_missing(value) else category_name(value)
        if key not in cache:
            digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
            place = int.from_bytes(digest, "big") / 2**64
            cache[key] = (
                TEST if place < test_share else VALID if place < test_share + valid_share else TRAIN
            )
        return cache[key]

    return np.fromiter((code(value) for value in values), np.int8)


def _order_in_time(blocks: Sequence[RowBlock], column: str, date_format: str | None) -> np.ndarray:
    """Rows by a column of dates, or of numbers that grow with time."""
    parts = []
    for block in blocks:
        start = block.start
        for batch in block.read([column]):
            values = sources.batch_columns(batch)[column]
            try:
                times_N = _times(column, values, date_format)
            except InvalidRecord as error:
                raise UserError(f"{block.place(start + (error.row or 0))}: {error}") from error
            if np.isnan(times_N).any():
                row = start + int(np.flatnonzero(np.isnan(times_N))[0])
                raise UserError(
                    f"{block.place(row)}: column '{column}' is missing; data.split_time needs a "
                    "date in every record."
                )
            parts.append(times_N)
            start += batch.num_rows
    return np.argsort(np.concatenate(parts), kind="stable")


def _times(column: str, values: Sequence[Any] | np.ndarray, date_format: str | None) -> np.ndarray:
    try:
        return Number(column).read(values)
    except InvalidRecord:
        return Date(column, date_format).read(values)


def _values(blocks: Sequence[RowBlock], column: str) -> Iterator[Any]:
    for block in blocks:
        for batch in block.read([column]):
            yield from sources.batch_columns(batch)[column]


def row_location(blocks: Sequence[RowBlock], row: int) -> str:
    """Where a row of a source is, in a user's words."""
    block = next(each for each in blocks if each.start <= row < each.start + each.num_rows)
    return block.place(row)
