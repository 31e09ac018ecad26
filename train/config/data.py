"""Options of the records: where they are, how they are split, what their columns are."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from train.config.section import ColumnName, Count, Section
from train.tasks.features import KINDS


class Data(Section):
    train: str = Field(
        description="Training records: path, folder, glob or URL of CSV, Parquet, JSON lines, "
        "Arrow or image folders; or sklearn:digits."
    )
    valid: str | None = Field(
        None, description="Validation records; split off the training records when not given."
    )
    test: str | None = Field(
        None, description="Test records; split off the training records when not given."
    )
    extra: str | None = Field(
        None,
        description="Further labelled records to train on; validation and test stay as they are "
        "without them.",
    )
    extra_fraction: float | None = Field(
        None,
        gt=0,
        le=0.95,
        description="Share of the training samples that are extra records, repeated or drawn by "
        "the seed of the splits; each once by default.",
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the training records held out to choose by."
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=0.5, description="Share split off for the test when data.test is not given."
    )
    train_on_valid: bool = Field(
        False,
        description="Train on the validation records too, once all is chosen; needs "
        "checkpoint.metric: last. The gate then compares on records that were learned from.",
    )
    split_seed: int = Field(
        0, ge=0, description="Seed of the splits; the same whatever the run's own seed."
    )
    split_key: ColumnName | None = Field(
        None, description="Column whose equal values stay in one split, such as a customer."
    )
    split_time: ColumnName | None = Field(
        None, description="Column with a date; the latest records become the test split."
    )
    drop: tuple[ColumnName, ...] = Field(
        (), description="Columns to leave out where features are not listed, as they leak."
    )
    encoding: str = Field("utf-8", description="Of CSV files, unless their mark says utf-16.")
    delimiter: Annotated[str | None, Field(min_length=1, max_length=1)] = Field(
        None, description="Between the fields of CSV files; found out by default."
    )
    quotes: bool | None = Field(
        None,
        description="Whether quotes hold the fields of CSV files together; by default they do, and "
        "fields that seem to be many records end the run.",
    )
    decimal: Literal[".", ","] | None = Field(
        None, description="Mark before the fraction of numbers in text; found out by default."
    )
    bad_records: Literal["refuse", "drop"] = Field(
        "refuse",
        description="A record that cannot be encoded ends the run, or is left out and counted.",
    )

    merge_noise: bool = Field(
        True,
        description="Merge the names of a column with more than twenty if the target does not "
        "differ between them by more than chance.",
    )

    @model_validator(mode="after")
    def _a_share_is_of_something(self) -> Self:
        if self.extra is None and self.extra_fraction is not None:
            raise ValueError("extra_fraction is for data.extra, which is not given; give both")
        return self


def kind_alone(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _known_kind(kind: str) -> str:
    if kind not in KINDS and ":" not in kind:
        raise ValueError(f"expected one of {', '.join(KINDS)}, or package.module:Class")
    return kind


class Column(Section):
    """What a column of the records is."""

    kind: Annotated[str, AfterValidator(_known_kind)] = Field(
        description=f"{', '.join(KINDS)}, or package.module:Class."
    )
    format: str | None = Field(
        None, description="Of a date, as strptime reads it; ISO 8601 by default."
    )
    decimal: Literal[".", ","] | None = Field(
        None, description="Mark before the fraction of a number in text; found out by default."
    )
    unit: str | None = Field(
        None, description="Of a number in text: a currency, % or such as kg; found out by default."
    )
    missing: tuple[float, ...] | None = Field(
        None, description="Numbers that stand for a missing one; found out by default."
    )
    size: tuple[Count, Count] | None = Field(
        None,
        description="Height and width to bring images to; the training images' median by default.",
    )
    channels: Literal[1, 3] | None = Field(
        None, description="1 for grey, 3 for colour; 3 by default if a training image has colour."
    )
    crop: bool | None = Field(
        None, description="Cut images to the size's shape before resizing, not squeeze them."
    )

    @model_validator(mode="after")
    def _only_what_suits(self) -> Self:
        """Refuse what a column of this kind has no use for."""
        suits = {
            "number": {"decimal", "unit", "missing"},
            "date": {"format"},
            "image": {"size", "channels", "crop"},
        }.get(self.kind, set())
        given = {name for name, value in self if value is not None} - {"kind"}
        if wrong := sorted(given - suits):
            raise ValueError(f"{wrong[0]} is not for columns of kind {self.kind}")
        return self


class Text(Section):
    max_tokens: int = Field(
        256, ge=1, le=65_536, description="Tokens of a record's texts together; more are cut."
    )
    vocabulary: int = Field(
        20_000, ge=100, le=1_000_000, description="Most tokens of the trained vocabulary."
    )
    tokenizer: str | None = Field(
        None, description="Path or URL of a Tokenizers JSON; trained on the records by default."
    )
