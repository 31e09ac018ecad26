"""Options of the network architecture."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from train.config.section import Count, Section


class Lora(Section):
    """Options of low-rank adapters (LoRA) of a pretrained encoder."""

    rank: int = Field(
        8, ge=1, le=1024, description="Rank of the adapters: more can learn more, and overfit more."
    )
    alpha: float = Field(
        16,
        gt=0,
        le=10_000,
        description="Scale of the adapters; they are multiplied by alpha / rank.",
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the encoder's layers that are adapted, such as [query, value]; by "
        "default all linear layers.",
    )


class Net(Section):
    """Options of the network architecture."""

    class_path: str | None = Field(
        None,
        description="Custom network as package.module:Class; it replaces all other options of this "
        "section. By default the built-in network for the kinds of columns is used.",
    )
    pretrained: str | None = Field(
        None,
        description="Pretrained encoder of the text columns or of the image columns, which "
        "replaces that trained from scratch: a folder with config.json, model.safetensors and "
        "tokenizer.json or preprocessor_config.json, or a name on the Hugging Face hub. Needs "
        "halyard[text] or halyard[vision].",
    )
    pooling: Literal["mean", "cls", "last"] | None = Field(
        None,
        description="Which vectors of a pretrained encoder represent a text: the mean over its "
        "tokens, that of the first, or that of the last; by default as the checkpoint says, else "
        "mean. Not for images.",
    )
    freeze: Literal["all", "none"] | Count = Field(
        "none",
        description="What of a pretrained encoder keeps its weights: all, none, or the embeddings "
        "and this number of layers. Defaults to all with fewer than 2,000 records. The vectors of "
        "a frozen encoder are computed once, unless images are augmented.",
    )
    lora: Lora | None = Field(
        None,
        description="Train low-rank adapters of a pretrained encoder instead of its weights; {} "
        "uses the defaults. They are merged into the weights before export. Needs halyard[lora].",
    )
    checkpoint: dict[str, Any] | None = Field(
        None,
        description="Architecture, licence and digest of the pretrained encoder; filled in from "
        "its files.",
    )
    widths: list[Count] = Field(
        [64, 128, 128],
        min_length=1,
        description="Channels of each convolution block of the image network. Each block halves "
        "height and width, so small images allow few blocks.",
    )
    text: Literal["bag_of_words", "transformer"] = Field(
        "bag_of_words",
        description="Text encoder: bag_of_words averages the token vectors and is fast; "
        "transformer uses the order of the tokens too and is slower.",
    )
    text_width: Count = Field(
        128, description="Size of a token vector; with transformer a multiple of 4."
    )
    text_layers: int = Field(
        2, ge=1, le=48, description="Number of transformer layers; bag_of_words ignores it."
    )
    text_dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Dropout in the text encoder, 0 to 1: with bag_of_words the fraction of tokens "
        "left out in training. Raise it when texts overfit.",
    )
    hidden: list[Count] = Field(
        [128, 128],
        description="Widths of the hidden layers over all inputs together. Models of images alone "
        "or texts alone have none.",
    )
    members: int = Field(
        1,
        ge=1,
        le=256,
        description="Number of ensemble members whose predictions are averaged. Members share all "
        "weights except one learned factor per input of the first hidden layer, so they add little "
        "size. Tables default to 8; models of images alone or texts alone ignore it.",
    )
    bins: int = Field(
        32,
        ge=2,
        le=256,
        description="Number of pieces in the piecewise linear encoding of each numeric column.",
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Dropout after each hidden layer, 0 to 1. Tables default to 0.2. Raise it when "
        "the model overfits.",
    )
    activation: Literal["relu", "gelu"] = Field(
        "relu",
        description="Activation of the image network: gelu learns a little faster, relu runs "
        "faster in int8.",
    )
    whiten: bool = Field(
        True,
        description="Start the image network with a fixed convolution that whitens 2×2 patches; "
        "with false that convolution is trained.",
    )

    @model_validator(mode="after")
    def _only_with_pretrained(self) -> Self:
        """Reject options of a pretrained encoder that there is none for, or that contradict."""
        given = {"pooling": self.pooling, "lora": self.lora}
        for name, value in given.items():
            if value is not None and self.pretrained is None:
                raise ValueError(f"option {name} needs a pretrained encoder; give net.pretrained")
        if self.lora is not None and self.freeze != "none":
            raise ValueError(
                f"option freeze is {self.freeze}, but lora trains adapters of all layers and keeps "
                "all weights; leave freeze out"
            )
        return self


def class_path_alone(value: Any) -> Any:
    """Return a string as the option `class_path`, so that `net: package.module:Class` is valid."""
    return {"class_path": value} if isinstance(value, str) else value
