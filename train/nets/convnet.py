"""A compact convolutional network for images.

After airbench94 by Keller Jordan (https://github.com/KellerJordan/cifar10-airbench): a frozen
stem that whitens 2×2 patches, blocks of two convolutions that are initialised as the identity,
batch normalisation without a learned scale, and global max pooling. The default activation is ReLU
instead of GELU, because engines fuse it into the previous convolution and it quantizes to int8
without loss.

Images may differ in height. A batch is then padded at the bottom with 0, and each image gets the
same outputs as alone: after each layer the rows of padding are set to 0, which is also what a
convolution assumes beyond the border of an image.

Shapes: N images of a sample, B batch, H height, W width, C channels, K outputs, P patches, D values
in a patch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class ConvBlock(nn.Module):
    """Convolution, 2×2 max pool, norm, activation; convolution, norm, activation."""

    def __init__(self, channels_in: int, channels: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = _convolution(channels_in, channels)
        self.norm1 = _norm(channels)
        self.conv2 = _convolution(channels, channels)
        self.norm2 = _norm(channels)

    def forward(self, x_BCHW: Tensor, there_BH: Tensor | None = None) -> Tensor:
        """float32 [B, C_in, H, W] → float32 [B, C, H // 2, W // 2].

        there_BH: bool [B, H // 2], False for padding of the result; None if there is none.
        """
        # The pool precedes the norm, so that the norm processes a quarter of the values.
        x_BCHW = self.norm1(F.max_pool2d(self.conv1(x_BCHW), 2), there_BH)
        x_BCHW = self.conv2(_masked(self.activation(x_BCHW), there_BH))
        return _masked(self.activation(self.norm2(x_BCHW, there_BH)), there_BH)


class RowNorm(nn.BatchNorm2d):
    """A batch norm whose statistics leave out the padding of images that differ in height."""

    def forward(self, x_BCHW: Tensor, there_BH: Tensor | None = None) -> Tensor:
        """float [B, C, H, W] → float [B, C, H, W]. there_BH: bool [B, H], False for padding."""
        if there_BH is None or not self.training:
            return super().forward(x_BCHW)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        there_B1H1 = there_BH[:, None, :, None]
        values_BCHW = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        count = there_BH.sum() * x_BCHW.shape[3]
        mean_C = (values_BCHW * there_B1H1).sum(dim=(0, 2, 3)) / count
        centred_BCHW = values_BCHW - mean_C[:, None, None]
        var_C = (centred_BCHW.square() * there_B1H1).sum(dim=(0, 2, 3)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * (count / (count - 1)), self.momentum)
        scale_C = self.weight * torch.rsqrt(var_C + self.eps)
        normal_BCHW = centred_BCHW * scale_C[:, None, None] + self.bias[:, None, None]
        return normal_BCHW.to(x_BCHW.dtype)


class ConvNet(nn.Module):
    """A network for images: uint8 [B, H, W, C], 0..255 → logits, float32 [B, K]."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        shape_HWC: tuple[int, int, int],
        num_outputs: int,
        widths: list[int],
        *,
        whiten: bool,
        activation: str = "relu",
        free_height: bool = False,
    ) -> None:
        """shape_HWC: height, width and channels of the smallest images.

        whiten: whether the stem is a fixed whitening transform instead of learned weights.
        free_height: whether images differ in height, so that rows of 0 at the bottom are padding.
        Raises ValueError if the images are too small to be halved by each block.
        """
        super().__init__()
        self.width = num_outputs
        height, width, channels = shape_HWC
        if min(height, width) - PATCH + 1 < 2 ** len(widths):
            most = max(min(height, width) - PATCH + 1, 1).bit_length() - 1
            remedy = f"give at most {most} widths" if most else "give a larger image.size"
            raise ValueError(
                f"images of {height}×{width} are too small for net.widths {widths}; {remedy}"
            )
        # Each principal direction of the patches occurs with both signs, because ReLU drops one.
        directions = PATCH * PATCH * channels
        self.stem = nn.Conv2d(channels, 2 * directions, PATCH)
        self.stem.requires_grad_(not whiten)
        self.whiten, self.free_height = whiten, free_height
        widths_in = [2 * directions, *widths[:-1]]
        self.activation = activation
        self.blocks = nn.ModuleList(
            ConvBlock(*pair, activation) for pair in zip(widths_in, widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], num_outputs)
        nn.init.normal_(self.head.weight, std=1 / widths[-1])
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def fit_inputs(self, images_BHWC: Tensor) -> None:
        """Set the normalisation and the whitening stem from training images, uint8 [B, H, W, C]."""
        there_BH = _rows(images_BHWC) if self.free_height else None
        images_BHWC = images_BHWC.float() / 255
        pixels_PC = (images_BHWC if there_BH is None else images_BHWC[there_BH]).flatten(0, -2)
        self.mean.copy_(pixels_PC.mean(dim=0))
        # Avoid division by 0 for constant channels.
        self.std.copy_(pixels_PC.std(dim=0).clamp_min(1e-3))
        if self.whiten:
            normal_BCHW = ((images_BHWC - self.mean) / self.std).permute(0, 3, 1, 2)
            patches_PD = F.unfold(normal_BCHW, PATCH).transpose(1, 2).flatten(0, 1)
            if there_BH is not None:
                columns = images_BHWC.shape[2] - PATCH + 1
                patches_PD = patches_PD[
                    there_BH[:, PATCH - 1 :].flatten().repeat_interleave(columns)
                ]
            values_D, vectors_DD = torch.linalg.eigh(patches_PD.T @ patches_PD / len(patches_PD))
            whitening_DD = (vectors_DD / torch.sqrt(values_D.clamp_min(0) + 5e-4)).T.flip(0)
            filters = whitening_DD.view(-1, *self.stem.weight.shape[1:])
            self.stem.weight.copy_(torch.cat([filters, -filters]))
            assert self.stem.bias is not None
            self.stem.bias.zero_()

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images [B, H, W, C] → logits [B, K]."""
        there_BH = _rows(images_BHWC)[:, PATCH - 1 :] if self.free_height else None
        # A permuted [B, H, W, C] tensor already has the channels_last memory format.
        x_BCHW = ((images_BHWC / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        x_BCHW = _masked(ACTIVATIONS[self.activation](self.stem(x_BCHW)), there_BH)
        for block in self.blocks:
            there_BH = _halved(there_BH)
            x_BCHW = block(x_BCHW, there_BH)
        return self.head(_highest(x_BCHW, there_BH))

    @torch.no_grad()
    def folded(self) -> "FoldedConvNet":
        """Return an equivalent network for inference, without normalisation layers.

        Input normalisation is folded into the stem, which has no padding, and each batch norm into
        the convolution before it. A batch norm is monotonic, because its scale is positive, so it
        can be moved across the max pool; so can ReLU.
        """
        net = FoldedConvNet(
            self.stem, self.blocks, self.head, self.activation, free_height=self.free_height
        )
        net.stem.weight.div_(255 * self.std[None, :, None, None])
        assert net.stem.bias is not None
        shift = self.stem.weight * (self.mean / self.std)[None, :, None, None]
        net.stem.bias.sub_(shift.sum(dim=(1, 2, 3)))
        return net.eval()


class FoldedConvNet(nn.Module):
    """A trained ConvNet in its inference form: uint8 images [B, H, W, C] → logits [B, K]."""

    def __init__(
        self,
        stem: nn.Conv2d,
        blocks: nn.ModuleList,
        head: nn.Linear,
        activation: str,
        *,
        free_height: bool,
    ) -> None:
        super().__init__()
        self.activation, self.free_height = ACTIVATIONS[activation], free_height
        self.stem = _copy(stem, stem.weight, stem.bias)
        pairs = [(b.conv1, b.norm1, b.conv2, b.norm2) for b in blocks if isinstance(b, ConvBlock)]
        self.first = nn.ModuleList([_fold(conv, norm) for conv, norm, _, _ in pairs])
        self.second = nn.ModuleList([_fold(conv, norm) for _, _, conv, norm in pairs])
        self.head = nn.Linear(head.in_features, head.out_features)
        self.head.load_state_dict(head.state_dict())

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images [B, H, W, C] → logits [B, K]."""
        there_BH = _rows(images_BHWC)[:, PATCH - 1 :] if self.free_height else None
        x_BCHW = self.activation(self.stem(images_BHWC.float().permute(0, 3, 1, 2)))
        x_BCHW = _masked(x_BCHW, there_BH)
        for first, second in zip(self.first, self.second, strict=True):
            there_BH = _halved(there_BH)
            x_BCHW = _masked(self._halve(first(x_BCHW)), there_BH)
            x_BCHW = _masked(self.activation(second(x_BCHW)), there_BH)
        return self.head(_highest(x_BCHW, there_BH))

    def _halve(self, x_BCHW: Tensor) -> Tensor:
        if self.activation is F.relu:  # directly after the convolution, so that engines fuse them
            return F.max_pool2d(F.relu(x_BCHW), 2)
        return self.activation(F.max_pool2d(x_BCHW, 2))


def _rows(images_BHWC: Tensor) -> Tensor:
    """Return which rows are not padding, bool [B, H]."""
    return images_BHWC.amax(dim=(2, 3)) > 0


def _halved(there_BH: Tensor | None) -> Tensor | None:
    """Return which rows of a 2×2 pool contain no padding, bool [B, H // 2]."""
    return None if there_BH is None else there_BH[:, 1::2]


def _masked(x_BCHW: Tensor, there_BH: Tensor | None) -> Tensor:
    return x_BCHW if there_BH is None else x_BCHW * there_BH[:, None, :, None]


def _highest(x_BCHW: Tensor, there_BH: Tensor | None) -> Tensor:
    """Return the maximum of each channel over an image without its padding, [B, C]."""
    if there_BH is None:
        return F.adaptive_max_pool2d(x_BCHW, 1).flatten(1)
    return x_BCHW.masked_fill(~there_BH[:, None, :, None], -torch.inf).amax(dim=(2, 3))


def _convolution(channels_in: int, channels: int) -> nn.Conv2d:
    """Return a 3×3 convolution that passes on the channels both sides have in common."""
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[: min(channels_in, channels)])
    return conv


def _norm(channels: int) -> RowNorm:
    norm = RowNorm(channels, momentum=0.15)
    norm.weight.requires_grad_(False)
    return norm


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold a batch norm in inference mode into the convolution before it."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    assert bool((scale > 0).all())
    return _copy(
        conv, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    )


def _copy(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a convolution of the same shape with other weights."""
    height, width = conv.kernel_size
    copy = nn.Conv2d(conv.in_channels, conv.out_channels, (height, width), padding=conv.padding[0])
    assert bias is not None
    copy.load_state_dict({"weight": weight, "bias": bias})
    return copy
