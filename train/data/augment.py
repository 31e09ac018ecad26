"""Image augmentation, one whole batch at a time, on the batch's device.

How a sample is augmented depends only on seed, epoch and sample id, not on the batch it is in.
Shapes: N samples of the training split, B batch, H height, W width, C channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import Augment, Stage
from train.data.batch_sampler import random_stream

GREY = 127
WHOLE = Stage()


@dataclass(frozen=True)
class MixedBatch:
    """A batch that mixes pairs of samples.

    The loss weighs targets_B by `share` and others_B by 1 - `share`; both are int64 [B].
    """

    inputs: list[Tensor]
    targets_B: Tensor
    others_B: Tensor
    share: float


class Augmentation:
    """Random augmentation of images, drawn per epoch and applied per batch."""

    def __init__(
        self, config: Augment, seed: int, num_samples: int, images: tuple[str, ...] = ()
    ) -> None:
        """images: names of the image inputs. num_samples: size N of the training split."""
        self._config = config
        self.images = images
        self._seed = seed
        self._num_samples = num_samples
        # Which samples are mirrored in even epochs. Odd epochs mirror the others, so two
        # consecutive epochs show both orientations of every image.
        self._flip_even_N = random_stream(seed, 0, "flip").random(num_samples) < 0.5

    def start_epoch(self, epoch: int) -> None:
        """Draw the augmentation of every sample for this epoch."""
        config, count = self._config, self._num_samples
        self._place_N2 = random_stream(self._seed, epoch, "shift").random((count, 2))
        self._flip_N = self._flip_even_N ^ bool(epoch % 2) if config.flip else None
        self._cutout_N2 = random_stream(self._seed, epoch, "cutout").random((count, 2))
        # Area, aspect ratio, x and y of each crop, all in [0, 1).
        self._crop_N4 = random_stream(self._seed, epoch, "crop").random((count, 4))

    def stage(self, share: float) -> Stage:
        """Return the stage that is active after this share of the steps, in [0, 1)."""
        return next(stage for stage in self._config.stages if share < stage.until)

    def apply(
        self,
        images_BHWC: Tensor,
        ids_B: np.ndarray,
        stage: Stage = WHOLE,
        heights_B: np.ndarray | None = None,
    ) -> Tensor:
        """Return the batch with each sample augmented.

        images_BHWC: uint8 [B, H, W, C], 0..255. ids_B: int64 [B], sample ids. heights_B: int64 [B]
        if images differ in height; they are only mirrored and shifted, and stay as high as they
        are. The result is uint8, or float32 0..255 if `crop_area` is set; H and W shrink with the
        stage's crop and scale.
        """
        config = self._config
        if config.crop_area is not None:
            images_BHWC = _zoom(images_BHWC, self._crop_N4[ids_B], config.crop_area)
        if config.translate or stage.crop < 1 or self._flip_N is not None:
            images_BHWC = self._cut(images_BHWC, ids_B, stage.crop, heights_B)
        if config.cutout:
            images_BHWC = _cut_out(images_BHWC, self._cutout_N2[ids_B], config.cutout)
        if stage.scale < 1:
            images_BHWC = _shrink(images_BHWC, stage.scale)
        return images_BHWC

    def mix(self, inputs: list[Tensor], targets_B: Tensor, key: int) -> MixedBatch:
        """Mix the batch with a permutation of itself by mixup or cutmix, if configured.

        inputs: the image batch [B, H, W, C] alone. targets_B: int64 [B]. The random draws depend
        only on the seed and `key`.
        """
        config = self._config
        if not config.mixup and not config.cutmix:
            return MixedBatch(inputs, targets_B, targets_B, 1.0)
        (images_BHWC,) = inputs
        draws = random_stream(self._seed, key, "mix")
        order_B = torch.from_numpy(draws.permutation(len(targets_B))).to(targets_B.device)
        others_BHWC, others_B = images_BHWC[order_B], targets_B[order_B]
        # If both are configured, each batch uses one of them with equal probability.
        if config.cutmix and (not config.mixup or draws.random() < 0.5):
            rows, columns = _box(
                images_BHWC.shape[1:3], draws.beta(config.cutmix, config.cutmix), draws
            )
            mixed_BHWC = images_BHWC.clone()
            mixed_BHWC[:, rows, columns] = others_BHWC[:, rows, columns]
            height, width = images_BHWC.shape[1:3]
            covered = (rows.stop - rows.start) * (columns.stop - columns.start)
            return MixedBatch([mixed_BHWC], targets_B, others_B, 1 - covered / (height * width))
        share = float(draws.beta(config.mixup, config.mixup))
        mixed_BHWC = share * images_BHWC.float() + (1 - share) * others_BHWC.float()
        return MixedBatch([mixed_BHWC], targets_B, others_B, share)

    def _cut(
        self, images_BHWC: Tensor, ids_B: np.ndarray, crop: float, heights_B: np.ndarray | None
    ) -> Tensor:
        """Mirror, shift and crop. Pixels uncovered by a shift are filled by reflection."""
        device, reach = images_BHWC.device, self._config.translate
        batch, height, width, _ = images_BHWC.shape
        sides = np.array([height, width])
        kept = np.maximum(np.round(sides * crop), 1).astype(int)
        starts_B2 = np.floor(self._place_N2[ids_B] * (sides - kept + 2 * reach + 1)) - reach
        starts_B2 = torch.from_numpy(starts_B2.astype(np.int64)).to(device)
        rows_H = torch.arange(kept[0], device=device)
        if heights_B is None:
            rows_BH = _reflect(rows_H + starts_B2[:, :1], height)
        else:
            heights_B1 = torch.from_numpy(heights_B).to(device)[:, None]
            shifted_BH = _reflect(rows_H + starts_B2[:, :1], heights_B1)
            rows_BH = torch.where(rows_H < heights_B1, shifted_BH, rows_H)
        columns_BW = torch.arange(kept[1], device=device) + starts_B2[:, 1:]
        if self._flip_N is not None:
            flip_B1 = torch.from_numpy(self._flip_N[ids_B]).to(device)[:, None]
            columns_BW = torch.where(flip_B1, width - 1 - columns_BW, columns_BW)
        columns_BW = _reflect(columns_BW, width)
        samples_B = torch.arange(batch, device=device)
        return images_BHWC[samples_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _shrink(images_BHWC: Tensor, scale: float) -> Tensor:
    """Downscale bilinearly with antialiasing."""
    size = [max(round(side * scale), 1) for side in images_BHWC.shape[1:3]]
    small_BCHW = F.interpolate(
        images_BHWC.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True
    )
    return small_BCHW.permute(0, 2, 3, 1)


def _zoom(images_BHWC: Tensor, draws_B4: np.ndarray, least_area: float) -> Tensor:
    """Resize a random crop, of aspect ratio 3/4 to 4/3, to the full image by bilinear sampling."""
    area_B = least_area + (1 - least_area) * draws_B4[:, 0]
    stretch_B = (3 / 4) ** (1 - 2 * draws_B4[:, 1])
    sides_B2 = np.minimum(np.sqrt(area_B[:, None] * np.stack([stretch_B, 1 / stretch_B], 1)), 1)
    centres_B2 = (1 - sides_B2) * (2 * draws_B4[:, 2:] - 1)
    affine_B23 = np.zeros((len(draws_B4), 2, 3), np.float32)
    affine_B23[:, 0, 0], affine_B23[:, 1, 1] = sides_B2.T
    affine_B23[:, :, 2] = centres_B2
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    theta = torch.from_numpy(affine_B23).to(images_BHWC.device)
    grid = F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    zoomed_BCHW = F.grid_sample(images_BCHW, grid, padding_mode="reflection", align_corners=False)
    return zoomed_BCHW.permute(0, 2, 3, 1)


def _cut_out(images_BHWC: Tensor, draws_B2: np.ndarray, size: int) -> Tensor:
    """Grey out a square at a random position, entirely inside the image if it fits."""
    inside_B = torch.ones(len(draws_B2), 1, 1, dtype=torch.bool)
    for axis, length in enumerate(images_BHWC.shape[1:3]):
        start_B = np.floor(draws_B2[:, axis] * (max(length - size, 0) + 1))
        distance_BL = torch.arange(length) - torch.from_numpy(start_B)[:, None]
        within_BL = (distance_BL >= 0) & (distance_BL < size)
        inside_B = inside_B & (within_BL[:, :, None] if axis == 0 else within_BL[:, None, :])
    return images_BHWC.masked_fill(inside_B[..., None].to(images_BHWC.device), GREY)


def _box(shape: tuple[int, ...], share: float, draws: np.random.Generator) -> tuple[slice, slice]:
    """Return rows and columns of a box that covers about 1 − share of the area.

    The box has a random centre and is clipped at the borders.
    """
    slices = []
    for length in shape:
        centre, half = draws.integers(length), length * math.sqrt(1 - share) / 2
        slices.append(slice(max(round(centre - half), 0), min(round(centre + half), length)))
    return slices[0], slices[1]


def _reflect(index: Tensor, size: int | Tensor) -> Tensor:
    """Reflect indices outside 0..size-1 at the borders, without repeating the border pixel."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
