"""Picture files: what they are by their headers, and their pixels as 8-bit grey or RGB.

Orientation that a camera noted (EXIF) is applied. What is transparent is laid over white. Palettes
and CMYK become RGB, and grey values of 16 bits the nearest of 8 bits. Of several frames or pages
the first is taken.
"""

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
KNOWN_PICTURES = "PNG, JPEG, WebP, BMP or TIFF"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
SHORT_SIGNATURES = (b"BM", b"\xff\xd8\xff")
# What follows in a JPEG file: the marker of its first segment.
JPEG_MARKERS = bytes([0xDB, 0xC0, 0xC2, 0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)])
# Of formats that are not read: GIF, BigTIFF, JPEG 2000, and those of HEIF and AVIF.
UNREAD_SIGNATURES = (b"GIF8", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ")
HEIF = b"ftyp"
# Larger pictures are refused from their header, before any pixel is decoded.
MAX_PIXELS = 4096 * 4096
# Each scan of a progressive JPEG file goes over all of its pixels; encoders write about ten.
SCAN, MAX_SCANS = b"\xff\xda", 64
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}
# EXIF's tag of the orientation, whose values from 5 on swap height and width.
ORIENTATION, SWAPPED = 0x0112, range(5, 9)
# Of a data URI, what stands before its data.
MAX_URI_HEAD = 200
# From 16 bits to 8.
STEP = 257


@dataclass(frozen=True)
class PictureHeader:
    """A picture's size as it is shown, and whether it has colours."""

    height: int
    width: int
    has_colour: bool


def picture_content(value: Any) -> bytes | None:
    """Return the bytes of a picture file; None for what holds none.

    value: bytes, a data URI with base64, or a data set's struct {"bytes", "path"}. Raises
    ValueError for a data URI whose base64 is wrong.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        if not is_data_uri(value):
            return None
        value = value.strip().encode()
    if not isinstance(value, bytes | bytearray | memoryview):
        return None
    head = bytes(value[:MAX_URI_HEAD])
    if head[:5].lower() != b"data:":
        return bytes(value)
    head, comma, _ = head.partition(b",")
    if not comma or not head.lower().rstrip().endswith(b";base64"):
        raise ValueError("is a data URI without base64")
    try:
        return base64.b64decode(bytes(value[len(head) + 1 :]), validate=True)
    except binascii.Error as error:
        raise ValueError("is a data URI whose base64 is wrong") from error


def is_data_uri(value: Any) -> bool:
    """Whether a text is a picture as a data URI."""
    return isinstance(value, str) and value.lstrip()[:11].lower() == "data:image/"


def has_signature(content: bytes) -> bool:
    """Whether bytes begin as a picture file does."""
    return content.startswith(SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def is_picture_file(content: bytes | memoryview) -> bool:
    """Whether bytes are a picture file or a data URI, of any format and also a damaged one, by how
    they begin; of a short signature, which pixels may begin with as well, by the header too."""
    start = bytes(content[:12])
    is_jpeg = start.startswith(b"\xff\xd8\xff") and start[3:4] in JPEG_MARKERS
    if start.startswith(SHORT_SIGNATURES) and not is_jpeg:
        return num_pixels(bytes(content)) > 0
    unread = start.startswith(UNREAD_SIGNATURES) or start[4:8] == HEIF
    return has_signature(start) or unread or start[:11].lower() == b"data:image/"


def num_pixels(value: Any) -> int:
    """Return how many pixels a picture file has by its header; 0 for what is none."""
    try:
        content = picture_content(value)
        if content is None:
            return 0
        image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Exception:  # Pillow raises many kinds; what is wrong is said when it is decoded
        return 0
    return image.width * image.height


def read_header(content: bytes) -> PictureHeader:
    """Raises ValueError that says what is wrong with a file."""
    image = _open(content)
    height, width = image.height, image.width
    try:  # of a PNG this reads all of the file
        # Pillow itself gives the size of a TIFF file as it is shown.
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in SWAPPED
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise _damaged(image, error) from error
    if turned:
        height, width = width, height
    return PictureHeader(height, width, _has_colour(image))


def read_pixels(content: bytes, *, grey: bool | None = None) -> np.ndarray:
    """Return a picture as uint8 [H, W] (grey) or [H, W, 3] (RGB); grey: as the file is if None.

    Raises ValueError that says what is wrong with a file.
    """
    image = _open(content)
    if grey is None:
        grey = not _has_colour(image)
    try:
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _from_16_bits(image)
        if image.has_transparency_data:
            over_white = Image.new("RGBA", image.size, "white")
            over_white.alpha_composite(image.convert("RGBA"))
            image = over_white.convert("RGB")
        return np.asarray(image.convert("L" if grey else "RGB"))
    except Exception as error:  # Pillow raises many kinds on a damaged file
        if isinstance(error, _OutOfRange):
            raise
        raise _damaged(image, error) from error


def _damaged(image: Image.Image, error: Exception) -> ValueError:
    return ValueError(f"holds a damaged {image.format or 'picture'} file ({error})")


class _OutOfRange(ValueError):
    """Pixels whose range is not known."""


def _open(content: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"is an image of too many pixels ({error}); at most {MAX_PIXELS} are accepted"
        ) from error
    except Exception as error:
        raise ValueError(f"holds {len(content)} bytes that are no {KNOWN_PICTURES} file") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"is an image of {image.width}×{image.height} pixels; at most {MAX_PIXELS} are accepted"
        )
    if image.format == "JPEG" and content.count(SCAN) > MAX_SCANS:
        raise ValueError(
            f"is a JPEG image of more than {MAX_SCANS} scans, which take too long to read"
        )
    if image.mode.startswith("F"):
        raise _OutOfRange("is an image of floating-point pixels, whose range is not known")
    return image


def _has_colour(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
    return image.mode not in GREY_MODES


def _from_16_bits(image: Image.Image) -> Image.Image:
    values_HW = np.asarray(image).astype(np.int64)
    if values_HW.size and (values_HW.min() < 0 or values_HW.max() > 0xFFFF):
        raise _OutOfRange("is an image of more than 16 bits a pixel, whose range is not known")
    return Image.fromarray(((values_HW + STEP // 2) // STEP).astype(np.uint8))
