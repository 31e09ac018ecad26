"""Features: records → arrays. Every kind of column has its encoder; together they make a task's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

from train.tasks.columns.categorical import Categories
from train.tasks.columns.image import Images
from train.tasks.columns.numeric import COLUMNS, Numbers
from train.tasks.columns.scalars import Number
from train.tasks.columns.text import Texts
from train.tasks.plugins import import_object
from train.values.records import Arrays, Columns, InvalidRecord, Record, TensorSpec, to_columns


class Encoder(Protocol):
    """How some columns become arrays. Its state is plain data; fitted on training records only."""

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        """What it takes from a record, as a client sends it."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that `encode` returns, in order, as a net takes them."""
        ...

    def fit(self, columns: Columns) -> Self: ...

    def encode(self, columns: Columns) -> Arrays:
        """Encode N records. Raises InvalidRecord, which says which of them."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """State as JSON, with the "kind" that finds the class again."""
        ...

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self: ...


ENCODERS: dict[str, type[Encoder]] = {
    "numbers": Numbers,
    "categories": Categories,
    "tokens": Texts,
    "image": Images,
}
# Names of inputs that hold several columns, and of the output.
RESERVED = (Numbers.kind, Categories.kind, Texts.kind, "logits")
# What a column may be said to be, besides the path of a user's own encoder.
KINDS = (*COLUMNS, "category", "text", "image")


@dataclass(frozen=True)
class Features:
    """The encoders of a task's columns, in the order of their arrays."""

    encoders: tuple[Encoder, ...]

    @classmethod
    def of(
        cls,
        kinds: Mapping[str, Mapping[str, Any]],
        *,
        decimal: str | None = None,
        max_tokens: int = 256,
        vocabulary: int = 20_000,
        tokenizer: str = "",
    ) -> Self:
        """Group columns by their kinds.

        kinds: for each column {"kind": one of KINDS or package.module:Class}, with the options of
        that kind: fields of its class. decimal: of numbers without one of their own.
        """
        numbers, categories, texts = [], [], []
        others: list[Encoder] = []
        for column, given in kinds.items():
            options = {key: value for key, value in given.items() if value is not None}
            kind = options.pop("kind")
            if column in RESERVED and kind not in (*COLUMNS, "category", "text"):
                raise ValueError(
                    f"a column of kind {kind} cannot be called '{column}', as an input is; "
                    "rename it"
                )
            if kind in COLUMNS:
                if kind == Number.kind:
                    options.setdefault("decimal", decimal)
                numbers.append(COLUMNS[kind](column, **options))
            elif kind == "category":
                categories.append(column)
            elif kind == "text":
                texts.append(column)
            elif kind == "image":
                others.append(Images(column, **options, optional=len(kinds) > 1))
            else:
                others.append(import_object(kind)(column))
        grouped: list[Encoder] = []
        if numbers:
            grouped.append(Numbers(tuple(numbers)))
        if categories:
            grouped.append(Categories(tuple(categories)))
        if texts:
            grouped.append(Texts(tuple(texts), max_tokens, vocabulary, tokenizer))
        return cls((*grouped, *others))

    @cached_property
    def fields(self) -> tuple[TensorSpec, ...]:
        """What a record holds, as a client sends it."""
        return tuple(field for encoder in self.encoders for field in encoder.fields)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that `encode` returns, in order."""
        return tuple(spec for encoder in self.encoders for spec in encoder.inputs)

    @cached_property
    def row_bytes(self) -> int:
        """How large a record's arrays are."""
        return sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in self.inputs)

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Those of the inputs that are images."""
        found = [encoder for encoder in self.encoders if isinstance(encoder, Images)]
        return tuple(encoder.column for encoder in found)

    def fit(self, columns: Columns) -> Self:
        return type(self)(tuple(encoder.fit(columns) for encoder in self.encoders))

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records. Raises InvalidRecord, which says which of them."""
        arrays: Arrays = {}
        for encoder in self.encoders:
            arrays |= encoder.encode(columns)
        return arrays

    def encode_records(self, records: Sequence[Record]) -> Arrays:
        return self.encode(to_columns(records, self.columns))

    def to_dict(self) -> list[dict[str, Any]]:
        return [encoder.to_dict() for encoder in self.encoders]

    @classmethod
    def from_dict(cls, states: Sequence[dict[str, Any]]) -> Self:
        """Raises ValueError for a kind that this version does not know."""
        return cls(tuple(encoder_class(state, ENCODERS).from_dict(state) for state in states))


def encoder_class(state: dict[str, Any], known: Mapping[str, Any]) -> Any:
    """Return the class of a saved state: one of `known`, or a user's own.

    Raises ValueError for one that is neither, NotAllowed for one that the operator has not named.
    """
    kind = state["kind"]
    if isinstance(kind, str) and kind in known:
        return known[kind]
    if isinstance(kind, str) and ":" in kind:
        return import_object(kind)
    raise ValueError(f"unknown kind '{kind}'; known are {sorted(known)} and package.module:Class")


__all__ = ["ENCODERS", "KINDS", "Encoder", "Features", "InvalidRecord", "encoder_class"]
