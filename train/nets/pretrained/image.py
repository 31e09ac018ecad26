"""A pretrained image encoder: pixels → one vector.

Shapes: B batch, H height, W width, C channels, D width of the vector.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.errors import error_line
from train.nets.pretrained.backbones import build_backbone
from train.nets.pretrained.checkpoints import TIMM
from train.nets.pretrained.encoder import Freeze, PretrainedEncoder


class PretrainedImage(PretrainedEncoder):
    """An encoder of timm or transformers: uint8 images [B, H, W, C], 0..255 → float32 [B, D].

    The vector is what the encoder's own last layer would be given: pooled features of a convolution
    network, the first token of a transformer. Grey images are given as three equal channels.
    """

    image_mean_C: Tensor
    image_std_C: Tensor

    def __init__(
        self,
        architecture: Mapping[str, Any],
        image: Mapping[str, Any],
        least_HW: tuple[int, int],
        freeze: Freeze,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """image: see `image_input`. least_HW: height and width of the smallest images.

        architecture: see `build_backbone`. freeze, adapters: see PretrainedEncoder. Raises
        ValueError for options that do not fit, for images of a size that the encoder does not take,
        and for an architecture that is not an image encoder.
        """
        name = architecture.get(TIMM) or architecture.get("model_type")
        backbone = build_backbone(architecture).eval()
        self_of = f"net.pretrained has the model type '{name}', which"
        if TIMM not in architecture and getattr(backbone.config, "vocab_size", None):
            raise ValueError(f"{self_of} is not an encoder of images")
        pixels_BCHW = torch.zeros(1, len(image["mean"]), *least_HW)
        try:
            with torch.no_grad():
                width = _vectors(backbone, pixels_BCHW).shape[1]
        except Exception as error:  # what the libraries raise differs by architecture
            raise ValueError(
                f"{self_of} does not accept images of {least_HW[0]}×{least_HW[1]}: "
                f"{error_line(error)}; leave out features.COLUMN.size and augment.stages to use "
                f"{'×'.join(map(str, image['size']))}"
            ) from error
        super().__init__(backbone, width, freeze, adapters)
        self.register_buffer("image_mean_C", torch.tensor(image["mean"]))
        self.register_buffer("image_std_C", torch.tensor(image["std"]))

    def embed(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images, or float32 0..255, [B, H, W, C] → float32 [B, D]."""
        # Grey images become RGB by broadcasting.
        x_BHWC = (images_BHWC / 255 - self.image_mean_C) / self.image_std_C
        return _vectors(self.backbone, x_BHWC.permute(0, 3, 1, 2))


def _vectors(backbone: torch.nn.Module, x_BCHW: Tensor) -> Tensor:
    """Normalised images [B, C, H, W] → the features of a network of timm or transformers [B, D]."""
    outputs = backbone(x_BCHW)
    if isinstance(outputs, Tensor):
        return outputs
    pooled = getattr(outputs, "pooler_output", None)
    # Without a pooled vector, the first token stands for the image.
    return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
