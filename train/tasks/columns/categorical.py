"""Categorical features: columns of names. Shapes: N records, C columns."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np

from train.values.names import NameForm, find_form, to_name
from train.values.records import (
    Arrays,
    Columns,
    InvalidRecord,
    TensorSpec,
    is_missing,
    shorten,
)

# The first codes of every column; the codes of its names follow from FIRST on.
UNSEEN, MISSING, FIRST = 0, 1, 2
# Only this many names of a column get codes, the most frequent ones; the others count as unseen.
MAX_NAMES = 10_000
# Names that a message lists.
MOST_SHOWN = 20


@dataclass(frozen=True)
class Categories:
    """Encodes columns of names as one array of codes, int32 [N, C].

    A name that `fit` did not see has the code 0, a missing value the code 1. For how numbers and
    booleans become names see train.values.names.

    names_C: the names of each column in the order of their codes, the most frequent first.
    with_missing_C: whether each column has missing values in the training records.
    refused_C: the codes of each column, UNSEEN or MISSING, that an imported model does not accept.
    """

    columns: tuple[str, ...]
    names_C: tuple[tuple[str, ...], ...] = ()
    with_missing_C: tuple[bool, ...] = ()
    refused_C: tuple[tuple[int, ...], ...] = ()

    kind: ClassVar[str] = "categories"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(column, "BYTES", ()) for column in self.columns)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.kind, "INT32", (len(self.columns),)),)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each column."""
        return tuple(FIRST + len(names) for names in self.names_C)

    def fit(self, columns: Columns) -> Self:
        """Return the encoder with the names of training records.

        Raises InvalidRecord if a value is not a name.
        """
        names_C, with_missing_C = [], []
        for column in self.columns:
            values = columns[column]
            keys = _keys(column, values, find_form(_distinct(values)))
            with_missing_C.append(None in keys)
            counts = Counter(key for key in keys if key is not None)
            ranked = sorted(counts, key=lambda name: (-counts[name], name))
            names_C.append(tuple(ranked[:MAX_NAMES]))
        return replace(self, names_C=tuple(names_C), with_missing_C=tuple(with_missing_C))

    def merge_names(self, columns: Collection[str]) -> Self:
        """Return the encoder without the names of these columns, which then count as unseen."""
        named = zip(self.columns, self.names_C, strict=True)
        return replace(self, names_C=tuple(() if name in columns else each for name, each in named))

    def encode(self, columns: Columns) -> Arrays:
        """Return {"categories": int32 [N, C]}. Raises InvalidRecord if a value is not a name."""
        assert len(self.names_C) == len(self.columns), "fit first"
        codes = [
            [codes.get(key, UNSEEN) for key in _keys(column, columns[column], form)]
            for column, codes, form in zip(
                self.columns, self._code_by_name_C, self._forms_C, strict=True
            )
        ]
        codes_NC = np.array(codes, np.int32).T.copy()
        for place, refused in enumerate(self.refused_C):
            wrong_N = np.isin(codes_NC[:, place], refused)
            if wrong_N.any():
                row = int(wrong_N.argmax())
                raise self._refusal(place, columns[self.columns[place]][row], row)
        return {self.kind: codes_NC}

    def _refusal(self, place: int, value: Any, row: int) -> InvalidRecord:
        names = self.names_C[place]
        came = "is missing" if is_missing(value) else f"is {shorten(value)}"
        known = ", ".join(names[:MOST_SHOWN]) + "…" * (len(names) > MOST_SHOWN)
        return InvalidRecord(
            f"field '{self.columns[place]}' {came}; the model accepts only {known}.", row
        )

    @cached_property
    def _code_by_name_C(self) -> list[dict[str | None, int]]:
        return [
            {None: MISSING, **{name: FIRST + code for code, name in enumerate(names)}}
            for names in self.names_C
        ]

    @cached_property
    def _forms_C(self) -> list[NameForm]:
        return [find_form(names) for names in self.names_C]

    def missing(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return by column which values count as missing, bool [N]. Raises InvalidRecord."""
        codes_NC = self.encode(columns)[self.kind]
        return dict(zip(self.columns, (codes_NC == MISSING).T, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "columns": list(self.columns),
            "names": [list(names) for names in self.names_C],
            "with_missing": list(self.with_missing_C),
            **({"refused": [list(codes) for codes in self.refused_C]} if self.refused_C else {}),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(
            tuple(state["columns"]),
            tuple(tuple(names) for names in state["names"]),
            tuple(state.get("with_missing", ())),
            tuple(tuple(codes) for codes in state.get("refused", ())),
        )


def _distinct(values: Sequence[Any] | np.ndarray) -> Iterable[Any]:
    """Return the distinct strings among values, followed by all values of other types."""
    texts = {value for value in values if type(value) is str}
    return chain(texts, (value for value in values if type(value) is not str))


def _keys(column: str, values: Sequence[Any] | np.ndarray, form: NameForm) -> list[str | None]:
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        distinct, codes_N = np.unique(values, return_inverse=True)
        names = [_key(column, 0, value, form) for value in distinct]
        return [names[code] for code in codes_N.tolist()]
    known: dict[str, str | None] = {}
    keys: list[str | None] = []
    for row, value in enumerate(values):
        if type(value) is not str:
            keys.append(_key(column, row, value, form))
            continue
        if value not in known:  # most columns have few distinct strings
            known[value] = _key(column, row, value, form)
        keys.append(known[value])
    return keys


def _key(column: str, row: int, value: Any, form: NameForm) -> str | None:
    if is_missing(value):
        return None
    try:
        return to_name(value, form)
    except ValueError as error:
        raise InvalidRecord(
            f"field '{column}' is {shorten(value)}, which {error}; expected a category. "
            "Send a text, a number or null.",
            row,
        ) from None
