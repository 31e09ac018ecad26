"""Decoding of images in any format, mode and orientation, against numpy."""

import io

import numpy as np
import pytest
from PIL import Image

from train.tasks import Images, InvalidRecord
from train.values import pictures


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def colours(rng) -> np.ndarray:
    return rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_same_pixels(colours, kind):
    content = saved(
        Image.fromarray(colours), kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    assert pictures.is_picture_file(content)
    np.testing.assert_array_equal(pictures.read_pixels(content), colours)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda shown: shown),
        (2, lambda shown: shown[:, ::-1]),
        (3, lambda shown: shown[::-1, ::-1]),
        (4, lambda shown: shown[::-1]),
        (5, lambda shown: shown.transpose(1, 0, 2)),
        (6, lambda shown: np.rot90(shown)),
        (7, lambda shown: shown[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda shown: np.rot90(shown, -1)),
    ],
)
def test_the_exif_orientation_is_applied(colours, orientation, upright):
    """upright: scene → pixels that a camera in that orientation stores."""
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    stored = np.ascontiguousarray(upright(colours))
    for kind in ("PNG", "TIFF"):
        content = saved(Image.fromarray(stored), kind, exif=exif)
        np.testing.assert_array_equal(pictures.read_pixels(content), colours)
        assert pictures.read_header(content) == pictures.PictureHeader(6, 10, True)


def test_transparent_pixels_become_white(colours):
    alpha = np.zeros((6, 10), np.uint8)
    alpha[2:4] = 255
    expected = np.where(alpha[:, :, None] > 0, colours, 255)
    with_alpha = Image.fromarray(np.dstack([colours, alpha]))
    np.testing.assert_array_equal(pictures.read_pixels(saved(with_alpha)), expected)
    grey = Image.fromarray(np.dstack([np.zeros_like(alpha), alpha]), "LA")
    np.testing.assert_array_equal(pictures.read_pixels(saved(grey)), np.where(alpha > 0, 0, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert (pictures.read_pixels(saved(palette)) == [200, 10, 10]).all()
    assert (pictures.read_pixels(saved(palette, transparency=1)) == 255).all()


def test_palettes_and_cmyk_become_rgb_and_16_bits_become_8():
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = pictures.read_pixels(saved(cmyk, "JPEG", quality=100))
    assert red.shape == (4, 4, 3)
    assert red[0, 0, 0] > 200
    assert red[0, 0, 1] < 60
    values = np.array([[0, 128, 129, 257, 65_535]], np.uint16)
    found = pictures.read_pixels(saved(Image.fromarray(values)))
    np.testing.assert_array_equal(found, np.round(values / 257).astype(np.uint8))
    greys = Image.new("P", (4, 4), 0)
    greys.putpalette([7, 7, 7, 9, 9, 9])
    assert not pictures.read_header(saved(greys)).has_colour


def test_pixels_of_unknown_range_are_refused():
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    with pytest.raises(InvalidRecord, match="field 'photo' is an image of floating-point"):
        Images("photo", (4, 4), 1).encode({"photo": [saved(floats, "TIFF")]})
    wide = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    with pytest.raises(InvalidRecord, match="more than 16 bits"):
        Images("photo", (4, 4), 1).encode({"photo": [saved(wide, "TIFF")]})


def test_size_and_channels_fit_all_training_images(colours):
    grey = saved(Image.new("L", (10, 6)))
    files = [grey, saved(Image.fromarray(colours)), saved(Image.new("L", (40, 30)))]
    fitted = Images("photo").fit({"photo": files})
    assert fitted.size == (6, 10)
    assert fitted.channels == 3
    assert Images("photo").fit({"photo": [grey, grey]}).channels == 1
    large = [saved(Image.new("L", (2000, 1000)))]
    assert Images("photo").fit({"photo": large}).size == (112, 224)
    assert Images("photo", (8, 8)).fit({"photo": files}).shape_HWC == (8, 8, 3)
