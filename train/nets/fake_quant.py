"""Quantization-aware training: weights and activations are rounded as in static int8.

After Jacob et al., https://arxiv.org/abs/1712.05877: the gradient of the rounding is 1 for values
within range and 0 outside. Implemented here because torch.ao.quantization is deprecated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install_fake_quant(net: nn.Module) -> None:
    """Make convolutions and linear layers round like int8, in place; parameter names are kept."""
    for layer in net.modules():
        if type(layer) in _ROUNDED:
            layer.__class__ = _ROUNDED[type(layer)]


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(_activation(x), _weight(self.weight), self.bias)


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_activation(x), _weight(self.weight), self.bias)


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Conv2d, nn.Linear: _Linear}


def _weight(weight: Tensor) -> Tensor:
    """Round to 7 bits, like the weights of static int8, with one scale for each output channel."""
    largest = weight.detach().abs().flatten(1).amax(dim=1)
    scale = (largest / 64).clamp_min(1e-12).float()
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -64, 64)


def _activation(x: Tensor) -> Tensor:
    """Round to 256 values between the minimum and the maximum of the batch."""
    if not x.is_floating_point():
        return x
    x = x.float()
    low, high = torch.aminmax(x.detach())
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / scale).round().to(torch.int32).clamp(0, 255)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
