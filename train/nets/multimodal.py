"""A network for any mix of inputs: one encoder for each, then shared hidden layers.

Shapes: N records of a sample, B batch, D sum of the encoders' widths, M ensemble members,
K outputs.
"""

import torch
from torch import Tensor, nn

from train.config import Net
from train.nets.convnet import ConvNet
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
    | PretrainedText
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
        elif [type(each) for each in encoders] == [PretrainedText]:
            layers.append(nn.Dropout(config.dropout))
        else:
            if config.members > 1:
                layers.append(MemberSigns(config.members, width))
            for hidden in config.hidden:
                layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
                width = hidden
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(width, task.target.num_outputs)
        self._target = task.target

    def fit_inputs(self, *inputs: Tensor) -> None:
        """Set the normalisation of each encoder from arrays [N, ...] of training records."""
        for encoder, values in zip(self.encoders, inputs, strict=True):
            if isinstance(encoder, PiecewiseLinearEncoding | ConvNet | PretrainedText):
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
        """Return the network in its inference form; the image encoders are folded in place."""
        for place, encoder in enumerate(self.encoders):
            if isinstance(encoder, ConvNet):
                self.encoders[place] = encoder.folded()
        return self.eval()


def _encoder(config: Net, encoder: Encoder, smallest_side: float) -> Part:
    if isinstance(encoder, Numbers):
        (spec,) = encoder.inputs
        return PiecewiseLinearEncoding(spec.shape[0], config.bins, encoder.with_missing_F)
    if isinstance(encoder, Categories):
        return CategoricalEmbeddings(encoder.sizes, encoder.with_missing_C)
    if isinstance(encoder, Texts):
        if config.checkpoint is not None:
            return PretrainedText(
                config.checkpoint["architecture"],
                config.pooling or config.checkpoint["pooling"],
                config.freeze,
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
        return image_net(config, encoder, config.widths[-1], smallest_side)
    raise ValueError(
        f"the inputs of {type(encoder).__name__} need a custom network; give "
        "--net.class_path package.module:Class"
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
