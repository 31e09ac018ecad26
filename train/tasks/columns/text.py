"""Text features: columns of text as token numbers.

Shapes: N records, L tokens, V token numbers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from train.values.ragged import FREE
from train.values.records import (
    Arrays,
    Columns,
    InvalidRecord,
    TensorSpec,
    is_missing,
    shorten,
    to_text,
)

# The first tokens of a trained vocabulary: unknown words, and the border between two columns.
UNKNOWN, BETWEEN = "[UNK]", "[SEP]"
# Text beyond max_tokens times this many characters is cut before tokenization, to save time.
MAX_TOKEN_CHARS = 64


@dataclass(frozen=True)
class Texts:
    """Encodes text columns, one after the other, as one array of token numbers, int32 [N, L].

    A token number is the token's id in the vocabulary plus 1. L is the number of tokens of the
    longest record, at least 1; shorter ones are padded with 0. A missing text has no tokens but
    those that a given tokenizer adds to every text. If it adds any, the columns are encoded as one
    text, with its last such token between them.

    max_tokens: further tokens of a record are cut off.
    vocabulary: maximum number of tokens if `fit` trains the tokenizer.
    tokenizer: JSON of Hugging Face Tokenizers; if it is empty, `fit` trains one.
    idf_V: smoothed inverse document frequency of each token number over the training records.
    """

    columns: tuple[str, ...]
    max_tokens: int = 256
    vocabulary: int = 20_000
    tokenizer: str = ""
    idf_V: tuple[float, ...] = ()

    kind: ClassVar[str] = "tokens"

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(column, "BYTES", ()) for column in self.columns)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.kind, "INT32", (FREE,)),)

    @property
    def size(self) -> int:
        """Number V of token numbers, with 0 for padding."""
        # A vocabulary may skip ids.
        return max(self._tokenizer.get_vocab().values()) + 2

    @property
    def unknown(self) -> int | None:
        """Token number of unknown words, or None if the vocabulary has no such token."""
        number = self._tokenizer.token_to_id(UNKNOWN)
        return None if number is None else number + 1

    def fit(self, columns: Columns) -> Self:
        """Return the encoder with tokenizer and inverse document frequencies of training records.

        Raises InvalidRecord if a value is not text.
        """
        tokenizer = self.tokenizer or _trained(self._all(columns), self.vocabulary).to_str()
        fitted = replace(self, tokenizer=tokenizer, idf_V=())
        tokens_NL = fitted.encode(columns)[self.kind]
        seen_V = np.zeros(fitted.size, np.int64)
        for tokens_L in tokens_NL:
            seen_V[np.unique(tokens_L)] += 1
        # Smoothed as in scikit-learn's TfidfTransformer.
        idf_V = np.log((1 + len(tokens_NL)) / (1 + seen_V)) + 1
        return replace(fitted, idf_V=tuple(np.round(idf_V, 4).tolist()))

    def encode(self, columns: Columns) -> Arrays:
        """Return {"tokens": int32 [N, L]}. Raises InvalidRecord if a value is not text."""
        texts_C = [self._texts(column, columns) for column in self.columns]
        if self._separator and len(texts_C) > 1:
            # One text, so that the tokenizer adds the tokens of its begin and end once.
            texts_C = [
                [self._separator.join(filter(None, texts)) for texts in zip(*texts_C, strict=True)]
            ]
        encoded_C = [self._tokenizer.encode_batch(texts) for texts in texts_C]
        rows = []
        for parts in zip(*encoded_C, strict=True):
            numbers = list(parts[0].ids)
            for part in parts[1:]:
                numbers += [*self._between, *part.ids]
            rows.append(numbers[: self.max_tokens])
        tokens_NL = np.zeros((len(rows), max([1, *map(len, rows)])), np.int32)
        for row, numbers in enumerate(rows):
            tokens_NL[row, : len(numbers)] = numbers
            tokens_NL[row, : len(numbers)] += 1
        return {self.kind: tokens_NL}

    def count_long(self, tokens_NL: np.ndarray) -> int:
        """Return how many records of tokens_NL have `max_tokens` tokens: those may be cut off."""
        if tokens_NL.shape[1] < self.max_tokens:
            return 0
        return int(np.count_nonzero(tokens_NL[:, self.max_tokens - 1]))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.tokenizer, "fit first"
        try:
            tokenizer = Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"the tokenizer is not a Hugging Face Tokenizers JSON: {error}"
            ) from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)
        return tokenizer

    @cached_property
    def _between(self) -> list[int]:
        number = self._tokenizer.token_to_id(BETWEEN)
        return [] if number is None else [number]

    @cached_property
    def _separator(self) -> str:
        """Text between two columns, if the tokenizer marks where a text begins or ends."""
        added = self._tokenizer.encode("").tokens
        return f" {added[-1]} " if added else ""

    def _texts(self, column: str, columns: Columns) -> list[str]:
        most = self.max_tokens * MAX_TOKEN_CHARS
        return [_text(column, row, value)[:most] for row, value in enumerate(columns[column])]

    def _all(self, columns: Columns) -> Iterator[str]:
        for column in self.columns:
            yield from self._texts(column, columns)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "columns": list(self.columns),
            "max_tokens": self.max_tokens,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer,
            "idf": list(self.idf_V),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(
            tuple(state["columns"]),
            state["max_tokens"],
            state["vocabulary"],
            state["tokenizer"],
            tuple(state["idf"]),
        )


def _trained(texts: Iterable[str], size: int) -> Tokenizer:
    """Train a tokenizer of lowercase words without accents that occur at least twice."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[UNKNOWN, BETWEEN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _text(column: str, row: int, value: Any) -> str:
    if is_missing(value):
        return ""
    try:
        if isinstance(value, str | bytes):
            return to_text(value)
        problem = "is not text"
    except ValueError as error:
        problem = str(error)
    raise InvalidRecord(
        f"field '{column}' is {shorten(value)}, which {problem}; expected text. "
        "Send a text in UTF-8, or null.",
        row,
    )
