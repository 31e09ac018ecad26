"""The sample that a model is imported with, as its process reads it. Shapes: N records."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from train.importing.isolated import Unsuitable
from train.tasks import Columns, InvalidRecord
from train.tasks.columns.scalars import Boolean, Number
from train.values.names import TRUTHS
from train.values.records import is_missing, shorten, to_text

SAMPLE = "sample.npz"
# Text that no model knows.
UNKNOWN = "\ufffd"


@dataclass(frozen=True)
class Sample:
    """Columns of a sample.

    texts: every column as texts, object [N] of str, None where missing. numbers: those in which all
    values are numbers or booleans, float64 [N], NaN where missing. booleans: names of the latter.
    """

    texts: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    booleans: frozenset[str]

    @classmethod
    def of(cls, columns: Columns, names: Sequence[str]) -> Self:
        """Return columns of records as read from a source."""
        texts, numbers, booleans = {}, {}, set()
        for name in names:
            values = columns[name]
            texts[name] = np.array(
                [None if is_missing(value) else _text(value) for value in values], object
            )
            if are_truths(values):
                numbers[name] = Boolean(name).read(values)
                booleans.add(name)
                continue
            try:
                numbers[name] = plain_number(name).read(values)
            except InvalidRecord:
                continue
        return cls(texts, numbers, frozenset(booleans))

    def write(self, folder: Path) -> None:
        """Write the sample for another process."""
        arrays = {}
        for place, (name, texts_N) in enumerate(self.texts.items()):
            missing_N = np.array([text is None for text in texts_N], bool)
            arrays[f"missing{place}"] = missing_N
            arrays[f"text{place}"] = np.where(missing_N, "", texts_N).astype(str)
            if name in self.numbers:
                kind = "boolean" if name in self.booleans else "number"
                arrays[f"{kind}{place}"] = self.numbers[name]
        np.savez(folder / SAMPLE, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> Self:
        """Read what `write` wrote, for columns with these names."""
        with np.load(folder / SAMPLE, allow_pickle=False) as file:
            arrays = dict(file)
        texts: dict[str, np.ndarray] = {}
        for place, name in enumerate(names):
            texts[name] = arrays[f"text{place}"].astype(object)
            texts[name][arrays[f"missing{place}"]] = None
        numbers, booleans = (
            {name: arrays[key] for i, name in enumerate(names) if (key := f"{kind}{i}") in arrays}
            for kind in ("number", "boolean")
        )
        return cls(texts, numbers | booleans, frozenset(booleans))

    def choose(self, wanted: Sequence[str] | None, count: int) -> list[str]:
        """Return the columns that a model takes, in its order.

        wanted: their names if the model knows them; otherwise it takes all columns, and `count`
        says how many. Raises Unsuitable if the sample does not have these columns.
        """
        have = list(self.texts)
        if wanted is None:
            if len(have) != count:
                raise Unsuitable(
                    f"it takes {count} columns, and the sample has {len(have)} besides the target: "
                    f"{', '.join(have)}"
                )
            return have
        if lacking := [name for name in wanted if name not in have]:
            raise Unsuitable(
                f"it takes the column '{lacking[0]}', which the sample does not have; there are "
                f"{', '.join(have)}"
            )
        return list(wanted)

    def matrix(self, names: Sequence[str]) -> np.ndarray:
        """Return columns as float64 [N, F]. Raises Unsuitable for a column of texts."""
        for name in names:
            if name not in self.numbers:
                value = next(text for text in self.texts[name] if text is not None)
                raise Unsuitable(
                    f"it takes numbers, and column '{name}' of the sample has texts such as "
                    f"{shorten(value)}"
                )
        return np.stack([self.numbers[name] for name in names], axis=1)

    def find_limits(
        self,
        names: Sequence[str],
        categories: Collection[str],
        run: Callable[["Sample"], np.ndarray],
    ) -> dict[str, list[str]]:
        """Return the columns of which a model accepts no "missing" value, or no "unknown" text.

        run: returns the model's outputs for a sample of one record, [1, …]. A value is not accepted
        if it raises an error, or if an output is not finite.
        """
        usual = self._usual()
        limits: dict[str, list[str]] = {"missing": [], "unknown": []}
        if not _succeeds(run, usual):
            return limits
        for name in names:
            if not _succeeds(run, usual.changed(name, None)):
                limits["missing"].append(name)
            if name in categories and not _succeeds(run, usual.changed(name, UNKNOWN)):
                limits["unknown"].append(name)
        return limits

    def _usual(self) -> "Sample":
        """Return one record of the median numbers and the most frequent texts."""
        texts, numbers = {}, {}
        for name, texts_N in self.texts.items():
            known = Counter(text for text in texts_N if text is not None)
            texts[name] = np.array([known.most_common(1)[0][0] if known else ""], object)
            if name in self.numbers:
                known_N = self.numbers[name][np.isfinite(self.numbers[name])]
                middle = float(np.sort(known_N)[len(known_N) // 2]) if len(known_N) else 0.0
                numbers[name] = np.array([middle])
        return Sample(texts, numbers, self.booleans)

    def changed(self, name: str, text: str | None) -> "Sample":
        """Return the one record with another text in a column, None for a missing value."""
        numbers = {**self.numbers}
        if name in numbers:
            numbers[name] = np.array([np.nan])
        return Sample({**self.texts, name: np.array([text], object)}, numbers, self.booleans)

    def frame(self, names: Sequence[str], categories: Collection[str]) -> Any:
        """Return columns as a data frame of pandas; those of `categories` are texts."""
        import pandas as pd

        columns = {}
        for name in names:
            if name in categories:
                texts_N = self.texts[name]
                columns[name] = pd.Series(np.where(texts_N == None, np.nan, texts_N))  # noqa: E711
                continue
            values_N = self.numbers[name]
            whole = np.isfinite(values_N).all() and (values_N == np.round(values_N)).all()
            kind = bool if name in self.booleans else np.int64
            columns[name] = pd.Series(values_N.astype(kind) if whole else values_N)
        return pd.DataFrame(columns)


def _succeeds(run: Callable[[Sample], np.ndarray], sample: Sample) -> bool:
    try:
        return bool(np.isfinite(run(sample)).all())
    except Exception:  # models raise many classes
        return False


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_text(value)


def are_truths(values: Sequence[Any] | np.ndarray) -> bool:
    """Return whether all values, [N], but missing ones are True or False, also as texts."""
    known = [value for value in values if not is_missing(value)]
    return bool(known) and all(
        isinstance(value, bool | np.bool_)
        or (isinstance(value, str) and value.strip().lower() in TRUTHS)
        for value in known
    )


def plain_number(column: str) -> Number:
    """Return a column of numbers with a decimal point, none of which means a missing value."""
    return Number(column, ".", "", ())
