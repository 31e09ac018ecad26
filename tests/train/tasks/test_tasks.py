"""Image features and class targets, against Pillow and scikit-learn."""

import io
import struct
import zlib

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from train.tasks import ClassTarget, Features, Images, InvalidRecord, Task
from train.values import pictures


def image_bytes(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def test_a_png_and_its_pixels_encode_the_same(pixels):
    features = Images("photo").fit({"photo": [pixels]})
    assert features.shape_HWC == (6, 5, 3)
    for value in (pixels, image_bytes(pixels), {"bytes": image_bytes(pixels), "path": None}):
        np.testing.assert_array_equal(features.encode({"photo": [value]})["photo"][0], pixels)


def test_a_jpeg_encodes_as_pillow_decodes_it(pixels):
    data = image_bytes(pixels, "JPEG")
    features = Images("photo", (6, 5), 3)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(features.encode({"photo": [data]})["photo"][0], expected)


def test_images_are_converted_to_the_fitted_size_and_colour(pixels):
    features = Images("photo", (4, 4), 1)
    expected = Image.fromarray(pixels).convert("L").resize((4, 4), Image.Resampling.BILINEAR)
    encoded = features.encode({"photo": [image_bytes(pixels)]})["photo"][0]
    np.testing.assert_array_equal(encoded[:, :, 0], np.asarray(expected))


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "missing"),
        ("text", "str"),
        (b"not an image", "not a PNG, JPEG"),
        (np.zeros((4, 4, 2), np.uint8), "1 or 3"),
        (np.zeros((4, 4), np.float32), "float32"),
        (np.zeros((0, 4), np.uint8), "[0, 4]"),
    ],
)
def test_the_error_names_the_field_of_an_invalid_image(value, word):
    with pytest.raises(InvalidRecord, match="field 'photo'") as caught:
        Images("photo", (4, 4), 1).encode({"photo": [value]})
    assert word in str(caught.value)


def test_a_truncated_image_is_refused(pixels):
    with pytest.raises(InvalidRecord, match="damaged PNG"):
        Images("photo", (6, 5), 3).encode({"photo": [image_bytes(pixels)[:70]]})


def test_an_image_is_refused_by_its_header_before_it_is_decoded(monkeypatch, pixels):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 29)
    with pytest.raises(InvalidRecord, match="5×6 pixels; at most 29"):
        Images("photo", (6, 5), 3).encode({"photo": [image_bytes(pixels)]})


def test_an_image_of_two_billion_pixels_is_refused_as_too_large():
    png = bytearray(image_bytes(np.zeros((1, 1), np.uint8)))
    png[16:24] = struct.pack(">II", 50_000, 50_000)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    with pytest.raises(InvalidRecord, match="too many pixels"):
        Images("photo", (4, 4), 1).encode({"photo": [bytes(png)]})


def test_classes_keep_the_order_of_numbers_and_sort_by_name():
    assert ClassTarget("y").fit([10, 2, "1"]).classes == ("1", "2", "10")
    assert ClassTarget("y").fit(["b", "a", "b"]).classes == ("a", "b")
    assert ClassTarget("y").fit([1.0, 0.0]).classes == ("0", "1")


def test_a_target_with_a_single_class_is_refused():
    with pytest.raises(InvalidRecord, match="only the value"):
        ClassTarget("y").fit([3, 3])


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_missing_label_is_refused(value):
    with pytest.raises(InvalidRecord, match="missing"):
        ClassTarget("y").fit([value, 1])


def test_the_error_for_an_unknown_class_lists_the_known_ones():
    with pytest.raises(InvalidRecord, match=r"'c'.*known are a, b"):
        ClassTarget("y", ("a", "b")).encode(["a", "c"])


def test_metrics_agree_with_scikit_learn(rng):
    logits = rng.normal(size=(50, 4)).astype(np.float32) * 3
    targets = rng.integers(0, 4, 50)
    target = ClassTarget("y", ("a", "b", "c", "d"))
    decoded = target.decode({"logits": logits})
    metrics = target.metrics({"logits": logits}, targets)
    labels = [target.classes[index] for index in targets]
    assert metrics["accuracy"] == sklearn.metrics.accuracy_score(labels, decoded["label"])
    expected = sklearn.metrics.log_loss(targets, decoded["probabilities"].astype(np.float64))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(decoded["probabilities"].sum(axis=1), 1, rtol=1e-6)


def test_a_task_survives_json():
    task = Task(Features((Images("photo", (6, 5), 3),)), ClassTarget("y", ("a", "b"), (1, 2)))
    assert Task.from_dict(task.to_dict()) == task


def test_a_jpeg_with_too_many_scans_is_refused_undecoded(rng):
    encoder = Images("image", (8, 8), 1)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    encoder._pixels(content)
    start = content.rindex(b"\xff\xda")
    with pytest.raises(InvalidRecord, match="more than 64 scans"):
        encoder._pixels(content[:-2] + content[start:-2] * 64 + content[-2:])
