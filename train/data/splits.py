"""Splits: assignment of each record to training, validation or test, without overlap.

Shapes: N records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import UserError
from train.config import Data
from train.data import batch_sampler
from train.data.reading import sources
from train.data.reading.sources import RowBlock
from train.tasks import InvalidRecord
from train.tasks.columns.scalars import Date, Number
from train.values import value_hash

MIN_TRAINING = 2
# Least number of records in a source that is split.
MIN_RECORDS = 20
# If a smaller share of records is distinct, equal records are taken for different cases of few
# possible values rather than for copies, and may be in different splits.
MIN_DISTINCT = 0.5
TRAIN, VALID, TEST, NOWHERE = 0, 1, 2, -1
NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitSource:
    """A source with the split of each of its rows.

    codes_N: int8 [N], TRAIN, VALID or TEST. copies_N: int64 [N], how many copies of each row are
    in the split; 1 each if None. note: for the data report.
    """

    url: str
    blocks: list[RowBlock]
    codes_N: np.ndarray
    copies_N: np.ndarray | None = None
    note: str = ""

    def turns(self, rows_N: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the splits of the rows rows_N, int8 [N], once for each copy.

        In turn t, from 0, rows with at most t copies are NOWHERE.
        """
        codes_N = self.codes_N[rows_N]
        copies_N = np.ones(len(rows_N)) if self.copies_N is None else self.copies_N[rows_N]
        for turn in range(int(copies_N.max(initial=0))):
            yield np.where(copies_N > turn, codes_N, NOWHERE)


def assign_splits(
    config: Data,
    opened: dict[str, list[RowBlock]],
    columns: Sequence[str],
    *,
    class_column: str | None = None,
    date_format: str | None = None,
) -> list[SplitSource]:
    """Return the sources with their splits, that of `data.train` first.

    opened: the blocks of "train" and, if configured, of "valid", "test" and "extra".
    columns: records are equal if they are equal in these columns. class_column: the target's
    column if it is a class. date_format: strptime format of `split_time`; ISO 8601 if None.

    A split without its own source is taken from the training records, either by a hash of the
    record or its `split_key`, or the latest records by `split_time`. With hashes, equal records
    are in one split, records keep their split when others are added, and shares are approximate.
    Extra records come last and are only for training; those that equal a held-out record or share
    its `split_key` are not used.

    Raises UserError if there are too few records, a split is empty, or a date cannot be read.
    """
    blocks = opened["train"]
    count = sum(block.num_rows for block in blocks)
    shares = (
        0.0 if config.valid else config.valid_fraction,
        0.0 if config.test else config.test_fraction,
    )
    if any(shares) and count < MIN_RECORDS:
        raise UserError(
            f"'{config.train}' has {count} records; at least {MIN_RECORDS} are needed to split "
            "them into train, valid and test. Add records, or give --data.valid and --data.test."
        )
    notes = []
    if config.split_time is not None:
        codes_N = _by_order(_order_in_time(blocks, config.split_time, date_format), shares)
    else:
        hash_N = _hash_records(blocks, columns if config.split_key is None else [config.split_key])
        if config.split_key is None and len(np.unique(hash_N)) < MIN_DISTINCT * count:
            hash_N = _told_apart(hash_N)
            notes.append("most records equal another; equal records may be in different splits")
        places_N = value_hash.fractions(hash_N, config.split_seed)
        class_N = None
        if class_column is not None:
            class_N = np.unique(_hash_records(blocks, [class_column]), return_inverse=True)[1]
        codes_N, moved = _by_hash(places_N, class_N, shares)
        if moved:
            notes.append(f"{moved:,} records were moved so that no split lacks a class or is empty")
    left = int(np.sum(codes_N == TRAIN))
    if left < MIN_TRAINING:
        raise UserError(
            f"'{config.train}' has {count} records, of which {left} are left to train on; "
            f"at least {MIN_TRAINING} are needed."
        )
    for code, share in ((VALID, shares[0]), (TEST, shares[1])):
        if share and not np.any(codes_N == code):
            raise UserError(
                f"no record of '{config.train}' falls into the {NAMES[code]} split; give "
                f"--data.{NAMES[code]}, or a --data.split_key with more different values."
            )
    parts = [SplitSource(config.train, blocks, codes_N, note="; ".join(notes))]
    for name, code in (("valid", VALID), ("test", TEST)):
        if name in opened:
            rows = sum(block.num_rows for block in opened[name])
            url = getattr(config, name)
            parts.append(SplitSource(url, opened[name], np.full(rows, code, np.int8)))
    if "extra" in opened:
        training = (TRAIN, VALID) if config.train_on_valid else (TRAIN,)
        num_training = sum(int(np.isin(part.codes_N, training).sum()) for part in parts)
        allowed_N = ~_held_out(config, parts, opened["extra"], columns, training)
        parts.append(_extra(config, opened["extra"], allowed_N, num_training))
    return parts


def _held_out(
    config: Data,
    parts: Sequence[SplitSource],
    extra: list[RowBlock],
    columns: Sequence[str],
    training: Sequence[int],
) -> np.ndarray:
    """Return which extra records equal a held-out record or share its split_key, bool [N]."""
    found_N = np.zeros(sum(block.num_rows for block in extra), bool)
    has = sources.source_schema(extra).names
    for names in (columns, [config.split_key] if config.split_key else None):
        if names is None or not all(name in has for name in names):
            continue
        held = [
            _hash_records(part.blocks, names)[~np.isin(part.codes_N, training)]
            for part in parts
            if all(name in sources.source_schema(part.blocks).names for name in names)
        ]
        found_N |= np.isin(_hash_records(extra, names), np.concatenate(held))
    return found_N


def _extra(
    config: Data, blocks: list[RowBlock], allowed_N: np.ndarray, num_training: int
) -> SplitSource:
    """Return the extra training records, with as many copies as extra_fraction needs.

    num_training: number of other training records. allowed_N: which extra records may be used.
    """
    assert config.extra is not None
    allowed = np.flatnonzero(allowed_N)
    rows = wanted = len(allowed)
    if config.extra_fraction is not None:
        wanted = max(1, round(num_training * config.extra_fraction / (1 - config.extra_fraction)))
    copies_N = np.zeros(len(allowed_N), int)
    if rows:
        times, left = divmod(wanted, rows)
        copies_N[allowed] = times
        order = batch_sampler.random_stream(config.split_seed, 0, "extra").permutation(rows)
        copies_N[allowed[order[:left]]] += 1
    held_out = len(allowed_N) - rows
    note = (
        f"{held_out:,} extra records are not trained on because they are held out"
        if held_out
        else ""
    )
    return SplitSource(
        config.extra, blocks, np.full(len(allowed_N), TRAIN, np.int8), copies_N, note
    )


def _hash_records(blocks: Sequence[RowBlock], columns: Sequence[str]) -> np.ndarray:
    """Return a hash of each record of a source by its values in these columns, uint64 [N]."""
    parts = [
        value_hash.hash_columns(sources.batch_columns(batch), columns, batch.num_rows)
        for block in blocks
        for batch in block.read(columns)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _told_apart(hash_N: np.ndarray) -> np.ndarray:
    """Return hashes that also depend on how often an equal hash occurred before, uint64 [N]."""
    order_N = np.argsort(hash_N, kind="stable")
    starts_N = np.r_[True, np.diff(hash_N[order_N]) != 0]
    first_N = np.maximum.accumulate(np.where(starts_N, np.arange(len(hash_N)), 0))
    turn_N = np.empty(len(hash_N), np.uint64)
    turn_N[order_N] = np.arange(len(hash_N)) - first_N
    return value_hash.mix(hash_N + turn_N)


def _by_hash(
    places_N: np.ndarray, class_N: np.ndarray | None, shares: tuple[float, float]
) -> tuple[np.ndarray, int]:
    """Return each record's split by its position in [0, 1), and how many records were moved.

    The lowest positions are test, the next validation, the rest training. Records at the same
    position stay together. class_N: class codes from 0, or None. Records are moved so that no
    split lacks a class, or is empty, if possible.
    """
    valid_share, test_share = shares
    ends = [test_share, test_share + valid_share]
    codes_N = np.array([TEST, VALID, TRAIN], np.int8)[np.searchsorted(ends, places_N, "right")]
    before_N = codes_N.copy()
    if class_N is None:
        class_N = np.zeros(len(places_N), np.int64)
    wanted = [TRAIN, *(code for code, share in ((TEST, test_share), (VALID, valid_share)) if share)]
    for code in wanted:
        has = np.bincount(class_N[codes_N == code], minlength=class_N.max(initial=-1) + 1)
        for lacking in np.flatnonzero(has == 0):
            # An earlier move for another class may have brought this one along.
            if not np.any((codes_N == code) & (class_N == lacking)):
                _move_one(codes_N, places_N, class_N, int(lacking), code)
    return codes_N, int(np.sum(codes_N != before_N))


def _move_one(
    codes_N: np.ndarray, places_N: np.ndarray, class_N: np.ndarray, lacking: int, code: int
) -> None:
    """Move the records at one position with class `lacking` into split `code`, which lacks it.

    Into training, move the highest position of the class. Into another split, move the lowest
    position in training whose removal leaves training with all of its classes.
    """
    of_class_N = class_N == lacking
    if code == TRAIN:
        codes_N[places_N == places_N[of_class_N].max()] = TRAIN
        return
    for place in np.unique(places_N[of_class_N & (codes_N == TRAIN)]):
        moved_N = places_N == place
        left_N = (codes_N == TRAIN) & ~moved_N
        if np.isin(class_N[moved_N], class_N[left_N]).all():
            codes_N[moved_N] = code
            return


def _by_order(order_N: np.ndarray, shares: tuple[float, float]) -> np.ndarray:
    """Return splits by order: the last records are test, those before validation, the rest train.

    order_N: row numbers, earliest first.
    """
    valid_share, test_share = shares
    count = len(order_N)
    num_test = max(1, round(test_share * count)) if test_share else 0
    num_valid = max(1, round(valid_share * count)) if valid_share else 0
    codes_N = np.full(count, TRAIN, np.int8)
    codes_N[order_N[count - num_test :]] = TEST
    codes_N[order_N[max(count - num_test - num_valid, 0) : count - num_test]] = VALID
    return codes_N


def _order_in_time(blocks: Sequence[RowBlock], column: str, date_format: str | None) -> np.ndarray:
    """Return row numbers sorted by a column of dates or of numbers that increase with time.

    Raises UserError that names the row of a missing or unreadable value.
    """
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
                    f"{block.place(row)}: column '{column}' is missing; data.split_time requires "
                    "a date in every record."
                )
            parts.append(times_N)
            start += batch.num_rows
    return np.argsort(np.concatenate(parts), kind="stable")


def _times(column: str, values: Sequence[Any] | np.ndarray, date_format: str | None) -> np.ndarray:
    try:
        return Number(column).read(values)
    except InvalidRecord:
        return Date(column, date_format).read(values)


def row_location(blocks: Sequence[RowBlock], row: int) -> str:
    """Return the file and row number of a source's row, for messages."""
    block = next(each for each in blocks if each.start <= row < each.start + each.num_rows)
    return block.place(row)
