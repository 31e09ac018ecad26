"""Notes for the data report on values that are read differently from how they are written.

Shapes: N records, F features.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.tasks import Categories, Columns, Images, NamedTarget, Numbers, Task, ValueTarget
from train.tasks.columns.categorical import MAX_NAMES
from train.tasks.columns.lists import MAX_LABELS, LabelSet
from train.tasks.columns.numeric import YEAR_S
from train.tasks.columns.scalars import Date, Number
from train.values.label_lists import split_labels
from train.values.names import find_form, to_name
from train.values.pictures import PictureHeader
from train.values.records import is_missing, shorten
from train.values.sentinels import find_sentinels

# A note is made if a smaller share of a column's distinct values stays distinct when encoded.
MIN_DISTINCT_KEPT = 0.5
MOST_SHOWN = 3
# If two-digit years span more than this, some were probably assigned to the wrong century.
LONGEST_YEARS = 50
# A column with more distinct texts holds amounts, whose spelling carries no meaning.
MOST_SPELLINGS = 100


def fit_notes(task: Task, sample: Columns) -> list[str]:
    """Return one sentence for each interpretation of the records that may surprise a user.

    sample: the training records that the features were fitted on.
    """
    notes: list[str] = []
    for encoder in task.features.encoders:
        if isinstance(encoder, Numbers):
            notes += _on_numbers(encoder, sample)
        elif isinstance(encoder, Images):
            notes += _on_images(encoder, sample[encoder.column])
        elif isinstance(encoder, Categories):
            for column in encoder.columns:
                notes += _on_names(column, sample[column])
    if isinstance(task.target, NamedTarget):
        labels = (
            split_labels(value, task.target.separator)
            if hasattr(task.target, "separator")
            else [value]
            for value in sample[task.target.column]
        )
        notes += _on_names(task.target.column, [label for each in labels for label in each])
    if isinstance(task.target, ValueTarget):
        notes += _on_target(task.target, sample[task.target.column])
    return notes


def missing_shares(task: Task, sample: Columns) -> dict[str, float]:
    """Return the share of values that count as missing, for each column."""
    found: dict[str, np.ndarray] = {}
    for encoder in task.features.encoders:
        if isinstance(encoder, Numbers | Categories):
            found |= encoder.missing(sample)
    shares = {}
    for column in task.features.columns:
        values_N = found.get(column, [is_missing(value) for value in sample[column]])
        shares[column] = float(np.mean(values_N)) if len(values_N) else 0.0
    return shares


def _on_numbers(encoder: Numbers, sample: Columns) -> Iterator[str]:
    for each in encoder.columns:
        values = sample[each.column]
        if isinstance(each, Number) and each.missing:
            raw_N = Number(each.column, each.decimal, each.unit, missing=()).read(values)
            for sentinel in each.missing:
                count = int(np.sum(raw_N == sentinel))
                yield (
                    f"'{each.column}': {count:,} values ({format_share(count / len(raw_N))}) are "
                    f"{sentinel:g} and count as missing because they are far from all others; "
                    f"set features.{each.column}.missing: [] to keep them as numbers"
                )
        if isinstance(each, Number):
            yield from _on_spellings(each, values)
        if isinstance(each, Date) and "%y" in (each.format or ""):
            yield from _on_short_years(each, values)
        if isinstance(each, LabelSet) and len(each.labels) == MAX_LABELS:
            yield f"'{each.column}': only the {MAX_LABELS} most frequent labels are used"
    scaled_NF = encoder.encode(sample)[encoder.kind]
    places = {column: place for place, column in enumerate(encoder.names)}
    for each in encoder.columns:
        if isinstance(each, Number | Date) and each.column in places:
            given = _num_distinct(each.read(sample[each.column]))
            kept = _num_distinct(scaled_NF[:, places[each.column]])
            if kept < MIN_DISTINCT_KEPT * given:
                yield (
                    f"'{each.column}': {given:,} different values become {kept:,} after scaling "
                    "because some are too far from the others; list those in "
                    f"features.{each.column}.missing"
                )


def _on_short_years(column: Date, values: Sequence[Any] | np.ndarray) -> Iterator[str]:
    """Note two-digit years whose range suggests that they belong to two centuries."""
    seconds_N = column.read(values)
    years_N = 1970 + seconds_N[~np.isnan(seconds_N)] / YEAR_S
    if len(years_N) and years_N.max() - years_N.min() > LONGEST_YEARS:
        yield (
            f"'{column.column}': two-digit years are read as {int(years_N.min())} to "
            f"{int(years_N.max())}; write four digits if some of them are earlier"
        )


def _on_target(target: ValueTarget, values: Sequence[Any] | np.ndarray) -> Iterator[str]:
    number = Number(target.column, target.decimal, target.unit, missing=())
    numbers_N = number.read(values)
    for sentinel in find_sentinels(numbers_N):
        count = int(np.sum(numbers_N == sentinel))
        yield (
            f"target '{target.column}': {count:,} values ({format_share(count / len(numbers_N))}) "
            f"are {sentinel:g}, far from all others, and are used as numbers; if they stand "
            "for missing values, remove those records"
        )


def _on_images(encoder: Images, values: Sequence[Any] | np.ndarray) -> Iterator[str]:
    headers = [value for value in values if isinstance(value, PictureHeader)]
    if len(headers) < 2:  # with size and channels configured, only one header is read
        return
    heights, widths = ([getattr(each, side) for each in headers] for side in ("height", "width"))
    seen = f"{min(heights)}×{min(widths)} to {max(heights)}×{max(widths)} pixels"
    colours = sum(header.has_colour for header in headers)
    height, width, channels = encoder.shape_HWC
    size = f"{height}×{width} (height × width)"
    if encoder.has_free_height:
        size = f"a width of {width}, in their aspect ratio"
    yield (
        f"images '{encoder.column}': {seen}, {colours:,} of {len(headers):,} in colour; all are "
        f"converted to {size}, {'grey' if channels == 1 else 'colour'}; "
        f"set features.{encoder.column}.size and .channels to change that"
    )


def _on_spellings(column: Number, values: Sequence[Any] | np.ndarray) -> Iterator[str]:
    """Note numbers that are written in several ways, such as 1.1 and 1.10, if there are few."""
    texts = {value.strip() for value in values if isinstance(value, str) and not is_missing(value)}
    if not texts or len(texts) > MOST_SPELLINGS:
        return
    written: Mapping[float, list[str]] = defaultdict(list)
    for text in sorted(texts):
        written[float(column.read([text])[0])].append(text)
    several = [each for number, each in written.items() if len(each) > 1 and number == number]
    if several:
        yield (
            f"'{column.column}': different texts of the same number count as one value: "
            + _listed(" and ".join(map(shorten, each[:2])) for each in several)
            + "; if they are names, such as versions, add a letter to them, as in v1.10"
        )


def _on_names(column: str, values: Sequence[Any] | np.ndarray) -> Iterator[str]:
    known = {value for value in values if isinstance(value, str) and not is_missing(value)}
    form = find_form(known)
    written: Mapping[str, list[str]] = defaultdict(list)
    for value in sorted(known):
        written[to_name(value, form)].append(value)
    merged = [each for each in written.values() if len(each) > 1]
    if merged:
        shown = _listed(" and ".join(map(_told_apart, each[:2])) for each in merged)
        yield (
            f"'{column}': values that differ only in spaces at their ends, Unicode form or "
            f"trailing zeros count as one name: {shown}"
        )
    if len(written) > MAX_NAMES:
        yield (
            f"'{column}': only the {MAX_NAMES:,} most frequent of {len(written):,} names are "
            "kept; the others count as unseen"
        )


def _told_apart(name: Any) -> str:
    """Return a name for a message, escaped if it is not NFC: é has a one- and a two-character form.

    Both forms look the same on screen, so the note would otherwise list two equal names.
    """
    composed = not isinstance(name, str) or unicodedata.is_normalized("NFC", name)
    return shorten(name) if composed else ascii(name)


def _listed(words: Iterable[str]) -> str:
    found = list(words)
    more = f" and {len(found) - MOST_SHOWN:,} more" if len(found) > MOST_SHOWN else ""
    return ", ".join(found[:MOST_SHOWN]) + more


def _num_distinct(values_N: np.ndarray) -> int:
    return len(np.unique(values_N[~np.isnan(values_N)]))


def format_share(share: float) -> str:
    """Return a share as a percentage, with two significant digits below 0.1 %."""
    return f"{share:.1%}" if share == 0 or share >= 0.001 else f"{100 * share:.2g}%"
