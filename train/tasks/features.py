"""Features: the encoders that turn the columns of records into arrays. Shapes: N records."""

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
from train.tasks.tensors import Tensors
from train.values.ragged import FREE
from train.values.records import Arrays, Columns, InvalidRecord, Record, TensorSpec, to_columns

# Assumed length of a record where it is free, to estimate memory.
TYPICAL = 256


class Encoder(Protocol):
    """Turns one or more columns into arrays. It is fitted on training records only."""

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        """The fields of a record that the encoder reads, as a client sends them."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that `encode` returns, in the order of the network's inputs."""
        ...

    def fit(self, columns: Columns) -> Self:
        """Return the encoder fitted to training records. Raises InvalidRecord."""
        ...

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records by name, each [N, …] as `inputs` describes it.

        Raises InvalidRecord, with the number of the record in `row`.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, with the "kind" by which the class is found."""
        ...

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Return the encoder of a state that `to_dict` returned."""
        ...


ENCODERS: dict[str, type[Encoder]] = {
    "numbers": Numbers,
    "categories": Categories,
    "tokens": Texts,
    "image": Images,
    "tensors": Tensors,
}
# Names of the inputs that hold several columns, and of the output. Columns with an input of their
# own must not have them.
RESERVED = (Numbers.kind, Categories.kind, Texts.kind, "logits")
# Kinds that a column may have; a custom encoder is named as package.module:Class instead.
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
        """Return unfitted encoders for columns of the given kinds, grouped by kind.

        kinds: {"kind": one of KINDS or package.module:Class} for each column, with options of that
        kind, which are fields of its class. decimal: decimal mark of numeric columns without their
        own. max_tokens, vocabulary, tokenizer: see `Texts`.
        Raises ValueError for a column with a reserved name or a class that cannot be imported.
        """
        numbers, categories, texts = [], [], []
        others: list[Encoder] = []
        for column, given in kinds.items():
            options = {key: value for key, value in given.items() if value is not None}
            kind = options.pop("kind")
            if column in RESERVED and kind not in (*COLUMNS, "category", "text"):
                raise ValueError(
                    f"a column of kind {kind} cannot be called '{column}', because an input has "
                    "that name; rename the column"
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
        """The fields of a record, as a client sends them."""
        return tuple(field for encoder in self.encoders for field in encoder.fields)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the fields of a record."""
        return tuple(field.name for field in self.fields)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that `encode` returns, in the order of the network's inputs."""
        return tuple(spec for encoder in self.encoders for spec in encoder.inputs)

    @cached_property
    def row_bytes(self) -> int:
        """Size of an encoded record in bytes, with a typical length where it is free."""
        return sum(
            spec.dtype.itemsize * math.prod(TYPICAL if n == FREE else n for n in spec.shape)
            for spec in self.inputs
        )

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Names of the inputs that are images."""
        found = [encoder for encoder in self.encoders if isinstance(encoder, Images)]
        return tuple(encoder.column for encoder in found)

    def fit(self, columns: Columns) -> Self:
        """Return the features with all encoders fitted to training records.

        Raises InvalidRecord.
        """
        return type(self)(tuple(encoder.fit(columns) for encoder in self.encoders))

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records by name, each [N, …] as `inputs` describes it.

        Raises InvalidRecord, with the number of the record in `row`.
        """
        arrays: Arrays = {}
        for encoder in self.encoders:
            arrays |= encoder.encode(columns)
        return arrays

    def encode_records(self, records: Sequence[Record]) -> Arrays:
        """Return what `encode` returns, [N, …] each, for N records. Raises InvalidRecord."""
        return self.encode(to_columns(records, self.columns))

    def to_dict(self) -> list[dict[str, Any]]:
        return [encoder.to_dict() for encoder in self.encoders]

    @classmethod
    def from_dict(cls, states: Sequence[dict[str, Any]]) -> Self:
        """Return the features of saved states. Raises ValueError for an unknown kind."""
        return cls(tuple(encoder_class(state, ENCODERS).from_dict(state) for state in states))


def encoder_class(state: dict[str, Any], known: Mapping[str, Any]) -> Any:
    """Return the class of a saved state: one of `known`, or a custom class.

    Raises ValueError for an unknown kind, NotAllowed for a class of a module that the operator has
    not allowed.
    """
    kind = state["kind"]
    if isinstance(kind, str) and kind in known:
        return known[kind]
    if isinstance(kind, str) and ":" in kind:
        return import_object(kind)
    raise ValueError(f"unknown kind '{kind}'; known are {sorted(known)} and package.module:Class")


__all__ = ["ENCODERS", "KINDS", "Encoder", "Features", "InvalidRecord", "encoder_class"]
