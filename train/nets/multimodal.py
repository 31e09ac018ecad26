"""A net for any mixture of inputs: an encoder for each, and hidden layers over all together.

Shapes: B batch, D width of all encoders together, M members, K outputs.
"""

import torch
from torch import Tensor, nn

from train.config import Net
from train.nets.convnet import ConvNet
from train.nets.tabular import (
    CategoricalEmbeddings,
    MemberSigns,
    PiecewiseLinearEncoding,
    average_members,
)
from train.nets.text import BagOfWords, TransformerEncoder
from train.tasks import Categories, Encoder, Images, Numbers, Task, Texts

TEXT_HEAD_DROPOUT = 0.5
Part = PiecewiseLinearEncoding | CategoricalEmbeddings | BagOfWords | TransformerEncoder | ConvNet


class MultimodalNet(nn.Module):
    """A task's arrays, in the order of its inputs → outputs [B, K].

    With several members, outputs of each in training, [B, M, K], so that each learns by itself.
    """

    def __init__(self, config: Net, task: Task, smallest_side: float = 1.0) -> None:
        """smallest_side: share of height and width of the smallest images.

        Raises ValueError if images are too small for the net, or for an input of a user's own
        encoder, which needs a net of the user's own.
        """
        super().__init__()
        encoders = [_encoder(config, each, smallest_side) for each in task.features.encoders]
        self.encoders = nn.ModuleList(encoders)
        width = sum(each.width for each in encoders)
        layers: list[nn.Module] = []
        if [type(each) for each in encoders] in ([BagOfWords], [TransformerEncoder]):
            # Words alone are best read off at once.
            layers.append(nn.Dropout(TEXT_HEAD_DROPOUT))
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
        """Let each encoder set its normalisation from a sample of training records."""
        for encoder, values in zip(self.encoders, inputs, strict=True):
            if isinstance(encoder, PiecewiseLinearEncoding | ConvNet):
                encoder.fit_inputs(values)

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = [encoder(values) for encoder, values in zip(self.encoders, inputs, strict=True)]
        # An encoder may answer in bf16, another in fp32.
        x_BD = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1)
        outputs = self.head(self.hidden(x_BD))
        if outputs.ndim == 3 and not self.training:
            return average_members(outputs, self._target)
        return outputs

    def folded(self) -> nn.Module:
        """Return the same function in its inference form."""
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
        f"the inputs of {type(encoder).__name__} need a net of your own; give "
        "--net.class_path package.module:Class"
    )


def image_net(config: Net, images: Images, num_outputs: int, smallest_side: float) -> ConvNet:
    height, width, channels = images.shape_HWC
    return ConvNet(
        (round(height * smallest_side), round(width * smallest_side), channels),
        num_outputs,
        config.widths,
        whiten=config.whiten,
        activation=config.activation,
    )
