"""Options of the records: where they are, how they are split, and what their columns hold."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from train.config.section import ColumnName, Count, Section
from train.tasks.features import KINDS


class Data(Section):
    """Options of the records: where they are, and how they are read and split."""

    train: str = Field(
        description="Training records: a file, folder, glob or URL of CSV, Parquet, JSON lines or "
        "Arrow files, or of images in one folder per class; or sklearn:digits."
    )
    valid: str | None = Field(
        None,
        description="Validation records, in the same form; by default data.valid_fraction of the "
        "training records.",
    )
    test: str | None = Field(
        None,
        description="Test records, in the same form; by default data.test_fraction of the training "
        "records.",
    )
    extra: str | None = Field(
        None,
        description="Additional labelled records for training only, such as feedback; they do not "
        "change the validation and test splits. Those that equal a held-out record are left out.",
    )
    extra_fraction: float | None = Field(
        None,
        gt=0,
        le=0.95,
        description="Fraction of the training samples that come from data.extra; its records are "
        "repeated or drawn at random to reach it. By default each is used once. Raise it to give "
        "few extra records more weight.",
    )
    valid_fraction: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="Fraction of the records to hold out for validation, unless data.valid is set.",
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="Fraction of the records to hold out for the test, unless data.test is set.",
    )
    train_on_valid: bool = Field(
        False,
        description="Train on the validation records too, for a final model whose options are "
        "settled; needs checkpoint.metric: last. Validation metrics then no longer show how the "
        "model does on new records.",
    )
    split_seed: int = Field(
        0,
        ge=0,
        description="Seed of the splits. It does not depend on the run's seed, so that runs with "
        "different seeds share their splits.",
    )
    split_key: ColumnName | None = Field(
        None,
        description="Column whose equal values stay in one split, such as a customer's id. Set it "
        "if records of one customer or device resemble each other.",
    )
    split_time: ColumnName | None = Field(
        None,
        description="Column of dates or times to split by: the latest records become the test "
        "split, those before them the validation split. Set it if the model is to predict the "
        "future.",
    )
    drop: tuple[ColumnName, ...] = Field(
        (),
        description="Columns to leave out when features are inferred, such as those that are known "
        "only together with the target.",
    )
    encoding: str = Field(
        "utf-8",
        description="Text encoding of CSV files, such as latin-1; a UTF-16 byte order mark takes "
        "precedence.",
    )
    delimiter: Annotated[str | None, Field(min_length=1, max_length=1)] = Field(
        None, description="Character between the fields of CSV files; detected by default."
    )
    quotes: bool | None = Field(
        None,
        description="Whether quotes enclose fields of CSV files. By default they do, and a quoted "
        "field that looks like several records ends the run; true accepts such fields, false reads "
        "quotes as text.",
    )
    decimal: Literal[".", ","] | None = Field(
        None,
        description="Decimal mark of numbers that are written as text; detected by default. Set it "
        "if 1,234 may mean two numbers.",
    )
    bad_records: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What to do with a record that cannot be encoded: refuse ends the run and "
        "names the record, drop leaves it out and counts it in the data report.",
    )

    merge_noise: bool = Field(
        True,
        description="Treat the names of a category column with 20 or more names as one if the "
        "target does not differ between them by more than chance. The data report lists such "
        "columns; set it to false to keep their names apart.",
    )

    @model_validator(mode="after")
    def _a_share_is_of_something(self) -> Self:
        if self.extra is None and self.extra_fraction is not None:
            raise ValueError("extra_fraction is for data.extra, which is not set; set both")
        return self


def kind_alone(value: Any) -> Any:
    """Return a string as the option `kind`, so that `age: number` is valid."""
    return {"kind": value} if isinstance(value, str) else value


def _known_kind(kind: str) -> str:
    if kind not in KINDS and ":" not in kind:
        raise ValueError(f"expected one of {', '.join(KINDS)}, or package.module:Class")
    return kind


class Column(Section):
    """Options of one input column. Options other than `kind` are for some kinds only."""

    kind: Annotated[str, AfterValidator(_known_kind)] = Field(
        description=f"Kind of the column: {', '.join(KINDS)}, or a custom encoder as "
        "package.module:Class."
    )
    format: str | None = Field(
        None,
        description="Format of a date in the notation of strptime, such as %d.%m.%Y; by default "
        "ISO 8601.",
    )
    decimal: Literal[".", ","] | None = Field(
        None,
        description="Decimal mark of numbers that are written as text; by default data.decimal, "
        "or else detected.",
    )
    unit: str | None = Field(
        None,
        description="Unit of numbers that are written as text: a currency, % or letters such as "
        "kg; detected by default.",
    )
    missing: tuple[float, ...] | None = Field(
        None, description="Numbers that mean a missing value, such as -999; detected by default."
    )
    size: tuple[Count | None, Count] | None = Field(
        None,
        description="Height and width in pixels that images are resized to; by default the median "
        "of the training images, with no side longer than 224. With height null, each image keeps "
        "its aspect ratio: it is resized to the width, and its height follows.",
    )
    channels: Literal[1, 3] | None = Field(
        None,
        description="Colour channels of images: 1 for grey, 3 for RGB; by default 3 if a training "
        "image has colour.",
    )
    crop: bool | None = Field(
        None,
        description="Crop images to the aspect ratio of `size` before resizing; by default they "
        "are stretched.",
    )

    @model_validator(mode="after")
    def _only_what_suits(self) -> Self:
        """Reject options that do not apply to a column of this kind."""
        suits = {
            "number": {"decimal", "unit", "missing"},
            "date": {"format"},
            "image": {"size", "channels", "crop"},
        }.get(self.kind, set())
        given = {name for name, value in self if value is not None} - {"kind"}
        if wrong := sorted(given - suits):
            raise ValueError(f"option {wrong[0]} does not apply to columns of kind {self.kind}")
        if self.crop and self.size and self.size[0] is None:
            raise ValueError("option crop needs a height in size; give one, or leave crop out")
        return self


class Text(Section):
    """Options of text columns."""

    max_tokens: int = Field(
        256,
        ge=1,
        le=65_536,
        description="Maximum number of tokens of a record over all its text columns; further "
        "tokens are cut off. Raise it for long texts; time and memory grow with it.",
    )
    vocabulary: int = Field(
        20_000,
        ge=100,
        le=1_000_000,
        description="Maximum number of tokens in the vocabulary that is trained on the records; a "
        "given tokenizer has its own.",
    )
    tokenizer: str | None = Field(
        None,
        description="Path or URL of a JSON file of Hugging Face Tokenizers; by default a "
        "vocabulary of words is trained on the training records.",
    )
