"""Features that are images. Shapes: N records, H height, W width, C channels."""

import io
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageOps

from train.values.records import Arrays, Columns, InvalidRecord, TensorSpec, is_missing, with_row

IMAGE_FORMATS = ("PNG", "JPEG")
IMAGE_SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff")
# Larger images are refused from their header, before any pixel is decoded.
MAX_PIXELS = 4096 * 4096
# Each scan of a progressive JPEG file goes over all of its pixels; encoders write about ten.
SCAN, MAX_SCANS = b"\xff\xda", 64
MODES = {1: "L", 3: "RGB"}


def is_image_file(content: bytes | memoryview) -> bool:
    """Whether bytes are an image file, by their signature and header."""
    return bytes(content[:8]).startswith(IMAGE_SIGNATURES) and num_pixels(bytes(content)) > 0


def num_pixels(value: Any) -> int:
    """Return how many pixels an image file has by its header; 0 for what is none."""
    if not isinstance(value, bytes):
        return 0
    try:
        image = Image.open(io.BytesIO(value), formats=IMAGE_FORMATS)
    except Exception:  # Pillow raises many kinds; what is wrong is said when it is decoded
        return 0
    return image.width * image.height


@dataclass(frozen=True)
class Images:
    """Images in one column: PNG or JPEG bytes, or a uint8 array [H, W] or [H, W, C].

    column: the record's field, and the tensor's name.
    size: (height, width) that every image is brought to; the first training image's when None.
    channels: 1 (grey) or 3 (RGB); as the first training image when None.
    crop: keep the shape of what is seen, and cut off what is too much on two sides.
    optional: a missing image counts as a black one; an error otherwise.
    """

    column: str
    size: tuple[int, int] | None = None
    channels: int | None = None
    crop: bool = False
    optional: bool = False

    kind: ClassVar[str] = "image"

    @property
    def shape_HWC(self) -> tuple[int, int, int]:
        assert self.size is not None, "fit first"
        assert self.channels is not None, "fit first"
        return (*self.size, self.channels)

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        if self.size is None or self.channels is None:  # not fitted: files of any size
            return (TensorSpec(self.column, "BYTES", ()),)
        return self.inputs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.column, "UINT8", self.shape_HWC),)

    def fit(self, columns: Columns) -> Self:
        """Take size and channels, where not given, from the first image there is."""
        if self.size is not None and self.channels is not None:
            return self
        for row, value in enumerate(columns[self.column]):
            if not is_missing(value):
                with with_row(row):
                    first = self._pixels(value)
                channels = 1 if first.ndim == 2 or first.shape[2] == 1 else 3
                height, width = first.shape[:2]
                size = self.size or (height, width)
                return replace(self, size=size, channels=self.channels or channels)
        raise InvalidRecord(f"field '{self.column}' is missing in every record; expected an image.")

    def encode(self, columns: Columns) -> Arrays:
        """Return {column: uint8 [N, H, W, C]}, RGB or grey, 0..255.

        Raises InvalidRecord if a value is neither an image file nor a uint8 array, or the image is
        larger than MAX_PIXELS.
        """
        values = columns[self.column]
        if (
            isinstance(values, np.ndarray)
            and values.shape[1:] == self.shape_HWC
            and values.dtype == np.uint8
        ):
            return {self.column: values}
        images_NHWC = np.zeros((len(values), *self.shape_HWC), np.uint8)
        for row, value in enumerate(values):
            with with_row(row):
                images_NHWC[row] = self._encoded(value)
        return {self.column: images_NHWC}

    def _encoded(self, value: Any) -> np.ndarray | int:
        if self.optional and is_missing(value):
            return 0
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
        if isinstance(value, dict):  # a data set's image struct: {"bytes", "path"}
            value = value.get("bytes")
        if not isinstance(value, bytes | bytearray | memoryview):
            came = "missing" if value is None else f"a {type(value).__name__}"
            raise InvalidRecord(
                f"field '{self.column}' is {came}; expected an image. "
                "Send the bytes of a PNG or JPEG file."
            )
        try:
            image = Image.open(io.BytesIO(value), formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            raise InvalidRecord(
                f"field '{self.column}' is an image of too many pixels ({error}); "
                f"at most {MAX_PIXELS} are accepted. Send a smaller one."
            ) from error
        except Exception as error:
            raise InvalidRecord(
                f"field '{self.column}' holds {len(value)} bytes that are no PNG or JPEG image. "
                "Send the bytes of such a file."
            ) from error
        if image.width * image.height > MAX_PIXELS:
            raise InvalidRecord(
                f"field '{self.column}' is an image of {image.width}×{image.height} pixels; "
                f"at most {MAX_PIXELS} are accepted. Send a smaller one."
            )
        if image.format == "JPEG" and bytes(value).count(SCAN) > MAX_SCANS:
            raise InvalidRecord(
                f"field '{self.column}' is a JPEG image of more than {MAX_SCANS} scans, which take "
                "too long to read. Write it again with fewer."
            )
        if image.mode.startswith(("I", "F")):
            raise InvalidRecord(
                f"field '{self.column}' is an image of {image.mode} pixels; expected 8 bits a "
                "channel. Convert it first, as its range is not known."
            )
        grey = self.channels == 1 or (self.channels is None and image.mode in ("1", "L"))
        try:
            return np.asarray(image.convert("L" if grey else "RGB"))
        except Exception as error:  # Pillow raises many kinds on a damaged file
            raise InvalidRecord(
                f"field '{self.column}' holds a damaged {image.format} image ({error}). "
                "Send the whole file."
            ) from error

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
        image = Image.fromarray(pixels)
        if image.mode != MODES[channels]:
            image = image.convert(MODES[channels])
        if image.size != (width, height) and self.crop:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        elif image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(self.shape_HWC)

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
