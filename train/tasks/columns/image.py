"""Image features. Shapes: N records, H height, W width, C channels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageOps

from train.values.pictures import (
    KNOWN_PICTURES,
    PictureHeader,
    picture_content,
    read_header,
    read_pixels,
)
from train.values.ragged import FREE
from train.values.records import Arrays, Columns, InvalidRecord, TensorSpec, is_missing, with_row

MODES = {1: "L", 3: "RGB"}
# Longest side in pixels of encoded images, unless a size is given.
MAX_SIDE = 224
# Limits of a free height: pixels, and multiple of the width. Other images are stretched to them.
LEAST_HEIGHT, MOST_HEIGHTS = 16, 4


@dataclass(frozen=True)
class Images:
    """Encodes a column of images as uint8 [N, H, W, C], RGB or grey, 0..255.

    A value is the content of an image file, see train.values.pictures, or an array, uint8 [H, W] or
    [H, W, C].

    column: name of the field of a record, and of the encoded array.
    size: (height, width) in pixels that every image is resized to; if None, `fit` uses the median
    of the training images, reduced so that no side exceeds MAX_SIDE. With a height of None, images
    keep their aspect ratio and differ in height. Their darkest value is then 1, because 0 is the
    padding of a batch.
    channels: 1 (grey) or 3 (RGB); if None, `fit` uses 3 if any training image has colour.
    crop: crop an image to the aspect ratio of `size` before resizing, instead of stretching it.
    optional: whether a missing image is encoded as black; otherwise it is an error.
    """

    column: str
    size: tuple[int | None, int] | None = None
    channels: int | None = None
    crop: bool = False
    optional: bool = False

    kind: ClassVar[str] = "image"

    @property
    def shape_HWC(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of an encoded image; H is FREE if images differ in height."""
        assert self.size is not None, "fit first"
        assert self.channels is not None, "fit first"
        height, width = self.size
        return (FREE if height is None else height, width, self.channels)

    @property
    def has_free_height(self) -> bool:
        """Whether images differ in height."""
        return self.size is not None and self.size[0] is None

    @property
    def least_HW(self) -> tuple[int, int]:
        """Height and width of the smallest encoded images."""
        height, width, _ = self.shape_HWC
        return (LEAST_HEIGHT if height == FREE else height), width

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        if self.size is None or self.channels is None:  # not fitted: accepts files of any size
            return (TensorSpec(self.column, "BYTES", ()),)
        return self.inputs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.column, "UINT8", self.shape_HWC),)

    def fit(self, columns: Columns) -> Self:
        """Return the encoder with size and channels set from training images, unless given.

        A value may also be a PictureHeader. Raises InvalidRecord if there is no image, or one
        cannot be read.
        """
        if self.size is not None and self.channels is not None:
            return self
        headers = []
        for row, value in enumerate(columns[self.column]):
            if isinstance(value, PictureHeader):
                headers.append(value)
            elif not is_missing(value):
                with with_row(row):
                    headers.append(self.header(value))
        if not headers:
            raise InvalidRecord(
                f"field '{self.column}' is missing in every record; expected an image."
            )
        channels = 3 if any(header.has_colour for header in headers) else 1
        return replace(
            self, size=self.size or _median_size(headers), channels=self.channels or channels
        )

    def header(self, value: Any) -> PictureHeader:
        """Return the size of an image and whether it has colour, without decoding its pixels.

        Raises InvalidRecord.
        """
        if isinstance(value, np.ndarray):
            pixels = self._checked_array(value)
            height, width = pixels.shape[:2]
            return PictureHeader(height, width, pixels.ndim == 3 and pixels.shape[2] == 3)
        content = self._content(value)
        try:
            return read_header(content)
        except ValueError as error:
            raise self._refused(error) from error

    def encode(self, columns: Columns) -> Arrays:
        """Return {column: uint8 [N, H, W, C]}, RGB or grey, 0..255.

        Images of free height are padded at the bottom with 0; H is the largest height. Raises
        InvalidRecord if a value is neither an image file nor a uint8 array, or an image has more
        than train.values.pictures.MAX_PIXELS pixels.
        """
        values = columns[self.column]
        if (
            isinstance(values, np.ndarray)
            and values.shape[1:] == self.shape_HWC
            and values.dtype == np.uint8
        ):
            return {self.column: values}
        if self.has_free_height:
            return {self.column: self._padded(values)}
        images_NHWC = np.zeros((len(values), *self.shape_HWC), np.uint8)
        for row, value in enumerate(values):
            with with_row(row):
                images_NHWC[row] = self._encoded(value)
        return {self.column: images_NHWC}

    def _padded(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        images = []
        for row, value in enumerate(values):
            with with_row(row):
                images.append(np.maximum(self._encoded(value), 1))
        heights = [len(image) for image in images]
        _, width, channels = self.shape_HWC
        images_NHWC = np.zeros((len(images), max(heights, default=1), width, channels), np.uint8)
        for padded, image in zip(images_NHWC, images, strict=True):
            padded[: len(image)] = image
        return images_NHWC

    def _encoded(self, value: Any) -> np.ndarray:
        if self.optional and is_missing(value):
            return np.zeros((*self.least_HW, self.shape_HWC[2]), np.uint8)
        if (
            isinstance(value, np.ndarray)
            and value.shape == self.shape_HWC
            and value.dtype == np.uint8
        ):
            return value
        return self._resized(self._pixels(value))

    def _pixels(self, value: Any) -> np.ndarray:
        """Return an image as uint8 [H, W] (grey) or [H, W, 3] (RGB)."""
        if isinstance(value, np.ndarray):
            return self._checked_array(value)
        content = self._content(value)
        try:
            return read_pixels(content, grey=None if self.channels is None else self.channels == 1)
        except ValueError as error:
            raise self._refused(error) from error

    def _content(self, value: Any) -> bytes:
        try:
            content = picture_content(value)
        except ValueError as error:
            raise self._refused(error) from error
        if content is None:
            came = "missing" if is_missing(value) else f"of type {type(value).__name__}"
            raise InvalidRecord(
                f"field '{self.column}' is {came}; expected an image. "
                f"Send the content of a {KNOWN_PICTURES} file."
            )
        return content

    def _refused(self, error: ValueError) -> InvalidRecord:
        return InvalidRecord(
            f"field '{self.column}' {error}. Send a complete {KNOWN_PICTURES} file with 8 or 16 "
            "bits per channel."
        )

    def _checked_array(self, value: np.ndarray) -> np.ndarray:
        grey_or_colour = value.ndim == 2 or (value.ndim == 3 and value.shape[2] in MODES)
        if value.dtype != np.uint8 or not grey_or_colour or 0 in value.shape:
            raise InvalidRecord(
                f"field '{self.column}' is {value.dtype} {list(value.shape)}; "
                "expected uint8 [height, width, 1 or 3]."
            )
        return value

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        height, width, channels = self.shape_HWC
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if height == FREE:
            height = round(pixels.shape[0] * width / pixels.shape[1])
            height = min(max(height, LEAST_HEIGHT), MOST_HEIGHTS * width)
        image = Image.fromarray(pixels)
        if image.mode != MODES[channels]:
            image = image.convert(MODES[channels])
        if image.size != (width, height) and self.crop:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        elif image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(height, width, channels)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            **vars(self),
            "size": list(self.size) if self.size else None,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        size = state["size"]
        return cls(
            state["column"],
            (size[0], size[1]) if size else None,
            state["channels"],
            state["crop"],
            state["optional"],
        )


def _median_size(headers: Sequence[PictureHeader]) -> tuple[int, int]:
    """Return median height and width, shrunk by one factor if a side exceeds MAX_SIDE."""
    height = float(np.median([header.height for header in headers]))
    width = float(np.median([header.width for header in headers]))
    shrink = min(1.0, MAX_SIDE / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))
