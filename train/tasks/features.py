"""Features: record → arrays."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from train.tasks.records import Arrays, InvalidRecord, Record, TensorSpec

IMAGE_FORMATS = ("PNG", "JPEG")
# Larger images are refused from their header, before any pixel is decoded.
MAX_PIXELS = 4096 * 4096
MODES = {1: "L", 3: "RGB"}


class Features(Protocol):
    """How a record becomes the arrays a net takes. Fitted on training records only."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that `encode` returns, in order."""
        ...

    def fit(self, records: Iterable[Record]) -> Self: ...

    def encode(self, record: Record) -> Arrays: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ImageFeatures:
    """An image in one column: PNG or JPEG bytes, or a uint8 array [H, W] or [H, W, C].

    column: the record's field, and the tensor's name.
    size: (height, width) that every image is brought to; the first training image's when None.
    channels: 1 (grey) or 3 (RGB); as the first training image when None.
    """

    column: str
    size: tuple[int, int] | None = None
    channels: int | None = None

    @property
    def shape_HWC(self) -> tuple[int, int, int]:
        assert self.size is not None, "fit first"
        assert self.channels is not None, "fit first"
        return (*self.size, self.channels)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.column, "UINT8", self.shape_HWC),)

    def fit(self, records: Iterable[Record]) -> Self:
        """Take size and channels, where not given, from the first record."""
        if self.size is not None and self.channels is not None:
            return self
        first = self._pixels(next(iter(records)))
        channels = 1 if first.ndim == 2 or first.shape[2] == 1 else 3
        height, width = first.shape[:2]
        return replace(self, size=self.size or (height, width), channels=self.channels or channels)

    def encode(self, record: Record) -> Arrays:
        """Return {column: uint8 [H, W, C]}, RGB or grey, 0..255.

        Raises InvalidRecord if the field is missing, is neither an image file nor a uint8 array,
        or the image is larger than MAX_PIXELS.
        """
        value = record.get(self.column)
        if (
            isinstance(value, np.ndarray)
            and value.shape == self.shape_HWC
            and value.dtype == np.uint8
        ):
            return {self.column: value}
        return {self.column: self._resized(self._pixels(record))}

    def _pixels(self, record: Record) -> np.ndarray:
        """Return the record's image as uint8 [H, W] (grey) or [H, W, 3] (RGB)."""
        value = record.get(self.column)
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
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(self.shape_HWC)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "image",
            "column": self.column,
            "size": list(self.size) if self.size else None,
            "channels": self.channels,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        size = state["size"]
        return cls(
            column=state["column"],
            size=(size[0], size[1]) if size else None,
            channels=state["channels"],
        )
