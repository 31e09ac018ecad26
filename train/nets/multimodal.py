"""A network for any mix of inputs: one encoder for each, then shared hidden layers.

Shapes: N records of a sample, B batch, D sum of the encoders' widths, M ensemble members,
K outputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Net
from train.nets.convnet import ConvNet
from train.nets.pretrained.encoder import PretrainedEncoder
from train.nets.pretrained.image import PretrainedImage
from train.nets.pretrained.text import PretrainedText
from train.nets.tabular import (
    CategoricalEmbeddings,
    MemberSigns,
    PiecewiseLinearEncoding,
    average_members,
)
from train.nets.text import BagOfWords, TransformerEncoder
from train.tasks import Categories, Encoder, Images, Numbers, Task, Texts

TEXT_HEAD_DROPOUT = 0.5
Part = (
    PiecewiseLinearEncoding
    | CategoricalEmbeddings
    | BagOfWords
    | TransformerEncoder
    | PretrainedEncoder
    | ConvNet
)


class MultimodalNet(nn.Module):
    """A task's arrays, in the order of its inputs → outputs, float32 [B, K].

    With several members, the outputs in training are [B, M, K], so that each member has its own
    loss.
    """

    def __init__(self, config: Net, task: Task, smallest_side: float = 1.0) -> None:
        """smallest_side: height and width of the smallest images, as a share of full size.

        Raises ValueError if images are too small for the network, if the options do not fit, or if
        the task has a custom encoder, which needs a custom network.
        """
        super().__init__()
        encoders = [_encoder(config, each, smallest_side) for each in task.features.encoders]
        self.encoders = nn.ModuleList(encoders)
        width = sum(each.width for each in encoders)
        layers: list[nn.Module] = []
        if [type(each) for each in encoders] in ([BagOfWords], [TransformerEncoder]):
            # A linear layer is most accurate if a text is the only input.
            layers.append(nn.Dropout(TEXT_HEAD_DROPOUT))
        elif [type(each) for each in encoders] in ([PretrainedText], [PretrainedImage]):
            layers.append(nn.Dropout(config.dropout))
        else:
            if config.members > 1:
                layers.append(MemberSigns(config.members, width))
            for hidden in config.hidden:
                layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
                width = hidden
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(width, task.target.num_outputs)
        if config.checkpoint is not None:
            # With few records, random initial weights would stay a part of the result.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self._target = task.target

    def fit_inputs(self, *inputs: Tensor) -> None:
        """Set the normalisation of each encoder from arrays [N, ...] of training records."""
        for encoder, values in zip(self.encoders, inputs, strict=True):
            if isinstance(encoder, PiecewiseLinearEncoding | ConvNet | PretrainedEncoder):
                encoder.fit_inputs(values)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Arrays of the task, [B, ...] each → [B, K], or [B, M, K] for members in training."""
        parts = [encoder(values) for encoder, values in zip(self.encoders, inputs, strict=True)]
        # Under autocast, one encoder may return bf16 and another fp32.
        x_BD = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1)
        outputs = self.head(self.hidden(x_BD))
        if outputs.ndim == 3 and not self.training:
            return average_members(outputs, self._target)
        return outputs

    def folded(self) -> nn.Module:
        """Return the network in its inference form; the encoders are changed in place."""
        for place, encoder in enumerate(self.encoders):
            if isinstance(encoder, ConvNet):
                self.encoders[place] = encoder.folded()
            elif isinstance(encoder, PretrainedEncoder):
                encoder.merge_adapters()
        return self.eval()


def _encoder(config: Net, encoder: Encoder, smallest_side: float) -> Part:
    known = config.checkpoint
    adapters = None if config.lora is None else config.lora.model_dump()
    if isinstance(encoder, Numbers):
        (spec,) = encoder.inputs
        return PiecewiseLinearEncoding(spec.shape[0], config.bins, encoder.with_missing_F)
    if isinstance(encoder, Categories):
        return CategoricalEmbeddings(encoder.sizes, encoder.with_missing_C)
    if isinstance(encoder, Texts):
        if known is not None and known["kind"] == "text":
            return PretrainedText(
                known["architecture"], config.pooling or known["pooling"], config.freeze, adapters
            )
        if config.text == "bag_of_words":
            return BagOfWords(encoder.idf_V, config.text_width, config.text_dropout)
        if config.text_width % 4:
            raise ValueError(f"net.text_width is {config.text_width}; expected a multiple of 4")
        return TransformerEncoder(
            encoder.size,
            encoder.max_tokens,
            config.text_width,
            config.text_layers,
            config.text_dropout,
        )
    if isinstance(encoder, Images):
        if known is not None and known["kind"] == encoder.kind:
            return _pretrained_image(config, encoder, smallest_side, adapters)
        return image_net(config, encoder, config.widths[-1], smallest_side)
    raise ValueError(
        f"the inputs of {type(encoder).__name__} need a custom network; give "
        "--net.class_path package.module:Class"
    )


def _pretrained_image(
    config: Net, images: Images, smallest_side: float, adapters: Mapping[str, Any] | None
) -> PretrainedImage:
    assert config.checkpoint is not None
    image = config.checkpoint["image"]
    if images.has_free_height:
        raise ValueError(
            f"a pretrained encoder needs images of one size; give features.{images.column}.size "
            "a height"
        )
    if images.shape_HWC[2] not in (1, len(image["mean"])):
        raise ValueError(
            f"the pretrained encoder takes images of {len(image['mean'])} channel; give "
            f"--features.{images.column}.channels {len(image['mean'])}"
        )
    height, width = (round(side * smallest_side) for side in images.least_HW)
    return PretrainedImage(
        config.checkpoint["architecture"], image, (height, width), config.freeze, adapters
    )


def image_net(config: Net, images: Images, num_outputs: int, smallest_side: float) -> ConvNet:
    """Return a ConvNet that fits the images. Raises ValueError if they are too small for it."""
    height, width = images.least_HW
    return ConvNet(
        (round(height * smallest_side), round(width * smallest_side), images.shape_HWC[2]),
        num_outputs,
        config.widths,
        whiten=config.whiten,
        activation=config.activation,
        free_height=images.has_free_height,
    )
