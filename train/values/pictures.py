"""Picture files: detecting them, reading their headers, and decoding to 8-bit grey or RGB.

The EXIF orientation is applied, and transparent pixels are blended with white. Palettes and CMYK
are converted to RGB, 16-bit grey values to the nearest 8-bit ones. Only the first frame or page of
a file is read. Shapes: H height, W width.
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
# First bytes of PNG, JPEG, BMP and TIFF files; for WebP see `has_signature`.
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
# Raw pixels may also start with these, so `is_picture_file` parses the header as well.
SHORT_SIGNATURES = (b"BM", b"\xff\xd8\xff")
# The byte after a JPEG signature: marker codes of the first segment.
JPEG_MARKERS = bytes([0xDB, 0xC0, 0xC2, 0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)])
# First bytes of unsupported formats: GIF, BigTIFF and JPEG 2000. HEIF and AVIF have HEIF at byte 4.
UNREAD_SIGNATURES = (b"GIF8", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ")
HEIF = b"ftyp"
# Larger pictures are rejected by their header, before any pixel is decoded.
MAX_PIXELS = 4096 * 4096
# Decoding a progressive JPEG takes one pass over all pixels per scan. Encoders write about ten
# scans; a crafted file with thousands would block the decoder.
SCAN, MAX_SCANS = b"\xff\xda", 64
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}
# EXIF tag of the orientation. Values 5 to 8 swap height and width.
ORIENTATION, SWAPPED = 0x0112, range(5, 9)
# Largest number of bytes in front of a data URI's data.
MAX_URI_HEAD = 200
# 65535 / 255, which converts 16-bit values to 8 bits.
STEP = 257


@dataclass(frozen=True)
class PictureHeader:
    """A picture's size in pixels after its orientation is applied, and whether it has colour."""

    height: int
    width: int
    has_colour: bool


def picture_content(value: Any) -> bytes | None:
    """Return the bytes of a picture file, None if the value has another type.

    value: bytes, a base64 data URI, or a struct {"bytes", "path"} as in datasets. Raises ValueError
    if a data URI is not valid base64.
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
        raise ValueError("is a data URI that is not base64-encoded")
    try:
        return base64.b64decode(bytes(value[len(head) + 1 :]), validate=True)
    except binascii.Error as error:
        raise ValueError("is a data URI whose base64 is invalid") from error


def is_data_uri(value: Any) -> bool:
    """Return whether a value is a text that starts as the data URI of an image."""
    return isinstance(value, str) and value.lstrip()[:11].lower() == "data:image/"


def has_signature(content: bytes) -> bool:
    """Return whether bytes start with the signature of a supported picture format."""
    return content.startswith(SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def is_picture_file(content: bytes | memoryview) -> bool:
    """Return whether bytes are a picture file or a data URI, judged by their first bytes.

    Unsupported formats and damaged files count too. After a short signature, which raw pixels may
    also start with, the header must be readable.
    """
    start = bytes(content[:12])
    is_jpeg = start.startswith(b"\xff\xd8\xff") and start[3:4] in JPEG_MARKERS
    if start.startswith(SHORT_SIGNATURES) and not is_jpeg:
        return num_pixels(bytes(content)) > 0
    unread = start.startswith(UNREAD_SIGNATURES) or start[4:8] == HEIF
    return has_signature(start) or unread or start[:11].lower() == b"data:image/"


def num_pixels(value: Any) -> int:
    """Return the number of pixels in a picture file's header, 0 if it is not a picture."""
    try:
        content = picture_content(value)
        if content is None:
            return 0
        image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Exception:  # Pillow raises many types; the error is reported when decoding
        return 0
    return image.width * image.height


def read_header(content: bytes) -> PictureHeader:
    """Return a picture's size and whether it has colour, without decoding its pixels.

    Raises ValueError with the problem if the file is unreadable, too large or unsupported.
    """
    image = _open(content)
    height, width = image.height, image.width
    try:  # for a PNG, getexif reads the whole file
        # For TIFF, Pillow already returns the size with the orientation applied.
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in SWAPPED
    except Exception as error:  # Pillow raises many types on a damaged file
        raise _damaged(image, error) from error
    if turned:
        height, width = width, height
    return PictureHeader(height, width, _has_colour(image))


def read_pixels(content: bytes, *, grey: bool | None = None) -> np.ndarray:
    """Return a picture as uint8 [H, W] (grey) or [H, W, 3] (RGB), 0..255.

    grey: which of both; None keeps what the file has. Raises ValueError with the problem if the
    file is damaged, too large or unsupported.
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
    except Exception as error:  # Pillow raises many types on a damaged file
        if isinstance(error, _OutOfRange):
            raise
        raise _damaged(image, error) from error


def _damaged(image: Image.Image, error: Exception) -> ValueError:
    return ValueError(f"is a damaged {image.format or 'picture'} file ({error})")


class _OutOfRange(ValueError):
    """Pixel values whose range is unknown, so that they cannot be converted to 8 bits."""


def _open(content: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"is an image of too many pixels ({error}); at most {MAX_PIXELS} are accepted"
        ) from error
    except Exception as error:
        raise ValueError(
            f"has {len(content)} bytes that are not a {KNOWN_PICTURES} file"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"is an image of {image.width}×{image.height} pixels; at most {MAX_PIXELS} are accepted"
        )
    if image.format == "JPEG" and content.count(SCAN) > MAX_SCANS:
        raise ValueError(
            f"is a JPEG image of more than {MAX_SCANS} scans, which take too long to decode"
        )
    if image.mode.startswith("F"):
        raise _OutOfRange("is an image of floating-point pixels, whose range is unknown")
    return image


def _has_colour(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
    return image.mode not in GREY_MODES


def _from_16_bits(image: Image.Image) -> Image.Image:
    values_HW = np.asarray(image).astype(np.int64)
    if values_HW.size and (values_HW.min() < 0 or values_HW.max() > 0xFFFF):
        raise _OutOfRange("is an image of more than 16 bits per pixel, whose range is unknown")
    return Image.fromarray(((values_HW + STEP // 2) // STEP).astype(np.uint8))
