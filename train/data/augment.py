"""Augmentation of images, a whole batch at a time, on the device where the batch is.

What happens to a sample depends on seed, epoch and sample id alone, never on its batch.
Shapes: B batch, H height, W width, C channels.
"""

import numpy as np
import torch
from torch import Tensor

from train.config import Augment
from train.data.order import generator


class Augmentation:
    """Draws an epoch's variations and applies them to batches."""

    def __init__(self, config: Augment, seed: int, num_samples: int) -> None:
        self._config = config
        self._seed = seed
        self._num_samples = num_samples
        # Whether a sample is mirrored in even epochs; in odd ones it is the other way round, so
        # that two epochs show both sides of every image.
        self._flip_even_N = generator(seed, 0, "flip").random(num_samples) < 0.5

    def start_epoch(self, epoch: int) -> None:
        reach = self._config.translate
        draws = generator(self._seed, epoch, "shift")
        self._shift_N2 = draws.integers(-reach, reach + 1, (self._num_samples, 2))
        self._flip_N = self._flip_even_N ^ bool(epoch % 2) if self._config.flip else None

    def apply(self, images_BHWC: Tensor, ids_B: np.ndarray) -> Tensor:
        """Return the batch, mirrored and shifted; what a shift uncovers is filled by reflection."""
        if not self._config.translate and self._flip_N is None:
            return images_BHWC
        device = images_BHWC.device
        batch, height, width, _ = images_BHWC.shape
        shift_B2 = torch.from_numpy(self._shift_N2[ids_B]).to(device)
        rows_BH = _reflect(torch.arange(height, device=device) + shift_B2[:, :1], height)
        columns_BW = torch.arange(width, device=device).expand(batch, width)
        if self._flip_N is not None:
            flip_B1 = torch.from_numpy(self._flip_N[ids_B]).to(device)[:, None]
            columns_BW = torch.where(flip_B1, width - 1 - columns_BW, columns_BW)
        columns_BW = _reflect(columns_BW + shift_B2[:, 1:], width)
        samples_B = torch.arange(batch, device=device)
        return images_BHWC[samples_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices outside 0..size-1 back at the borders, the border itself not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
