"""Options of the net."""

from typing import Any, Literal

from pydantic import (
    Field,
)

from train.config.section import Count, Section


class Net(Section):
    class_path: str | None = Field(
        None, description="package.module:Class of a custom net, in place of all options below."
    )
    widths: list[Count] = Field(
        [64, 128, 128], min_length=1, description="Channels of each block, which halves the image."
    )
    text: Literal["bag_of_words", "transformer"] = Field(
        "bag_of_words", description="Mean of the words' vectors, or a small transformer encoder."
    )
    text_width: Count = Field(128, description="Size of a word's vector.")
    text_layers: int = Field(2, ge=1, le=48, description="Layers of the transformer.")
    text_dropout: float = Field(0.2, ge=0, lt=1, description="Share of words left out in training.")
    hidden: list[Count] = Field(
        [128, 128], description="Hidden layers over numbers, categories and all inputs together."
    )
    members: int = Field(
        1,
        ge=1,
        le=256,
        description="Nets whose predictions are averaged; they share all weights but the signs of "
        "what the hidden layers see.",
    )
    bins: int = Field(
        32, ge=2, le=256, description="Pieces of a number's range, each with a weight of its own."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Share of hidden values left out.")
    activation: Literal["relu", "gelu"] = Field(
        "relu", description="gelu learns a little faster; relu runs faster in int8."
    )
    whiten: bool = Field(
        True, description="Start with a fixed convolution that whitens 2×2 patches."
    )


def class_path_alone(value: Any) -> Any:
    return {"class_path": value} if isinstance(value, str) else value
