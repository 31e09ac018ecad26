"""Images that keep their aspect ratio: padding changes no output, statistic or gradient."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from cluster.errors import UserError
from tests.conftest import make_config
from train import nets
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.recipes import export_onnx
from train.config import Augment, Net
from train.data import dataset
from train.data.augment import Augmentation
from train.nets.convnet import RowNorm
from train.tasks import ClassTarget, Features, Images, InvalidRecord, Task
from train.tasks.columns.image import LEAST_HEIGHT, MOST_HEIGHTS
from train.training import check_against_data
from train.values.ragged import FREE, row_lengths

WIDTH = 18
HEIGHTS = (16, 17, 23, 40, MOST_HEIGHTS * WIDTH)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def encoder():
    return Images("picture", (None, WIDTH), 3)


@pytest.fixture
def task(encoder):
    return Task(Features((encoder,)), ClassTarget("y").fit(["a", "b", "c"]))


@pytest.fixture
def images(rng):
    """Images of the width of the encoder, uint8 [H, W, 3] with a different H each."""
    return [rng.integers(0, 256, (height, WIDTH, 3), dtype=np.uint8) for height in HEIGHTS]


@pytest.fixture
def batch(encoder, images):
    return encoder.encode({"picture": images})["picture"]


@pytest.mark.parametrize(
    ("size", "height"),
    [((90, 36), 45), ((36, 90), 16), ((100, 10), MOST_HEIGHTS * WIDTH), ((1, 1), 18), ((9, 9), 18)],
)
def test_images_keep_their_aspect_ratio(encoder, rng, size, height):
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    (found,) = encoder.encode({"picture": [png(pixels)]})["picture"]
    assert found.shape == (max(height, LEAST_HEIGHT), WIDTH, 3)
    resized = Image.fromarray(pixels).resize(found.shape[1::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found, np.maximum(np.asarray(resized), 1))


def test_black_rows_at_the_bottom_are_not_padding(encoder):
    dark = np.zeros((30, WIDTH, 3), np.uint8)
    high = np.full((50, WIDTH, 3), 9, np.uint8)
    found = encoder.encode({"picture": [dark, high]})["picture"]
    assert row_lengths(found).tolist() == [30, 50]
    assert found[0, :30].max() == found[0, :30].min() == 1


def test_a_missing_image_is_the_smallest_black_one():
    optional = Images("picture", (None, WIDTH), 1, optional=True)
    found = optional.encode({"picture": [None]})["picture"]
    np.testing.assert_array_equal(found, np.ones((1, LEAST_HEIGHT, WIDTH, 1), np.uint8))
    with pytest.raises(InvalidRecord, match="missing"):
        Images("picture", (None, WIDTH), 1).encode({"picture": [None]})


def test_the_state_restores_a_free_height(encoder):
    restored = Images.from_dict(encoder.to_dict())
    assert restored == encoder
    assert restored.inputs[0].shape == (FREE, WIDTH, 3)


def test_a_crop_without_a_height_is_refused():
    options = {"kind": "image", "size": (None, WIDTH), "crop": True}
    with pytest.raises(UserError, match="crop needs a height in size"):
        make_config(features={"image": options})


def trained_norms(net):
    """Give the norms of a network statistics and shifts as after a training."""
    generator = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.bias.data.normal_(0, 0.5, generator=generator)
    return net


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("folded", [False, True])
def test_outputs_do_not_depend_on_companions(task, batch, images, encoder, activation, folded):
    torch.manual_seed(0)
    net = trained_norms(nets.create_net(Net(widths=[8, 6, 5], activation=activation), task)).eval()
    net.fit_inputs(torch.from_numpy(batch))
    net = nets.folded_net(net) if folded else net
    # A network without a mask is the reference: one image has no padding.
    plain = nets.create_net(
        Net(widths=[8, 6, 5], activation=activation),
        Task(Features((Images("picture", (40, WIDTH), 3),)), task.target),
    ).eval()
    with torch.no_grad():
        together = net(torch.from_numpy(batch))
        for row, image in enumerate(images):
            alone = encoder.encode({"picture": [image]})["picture"]
            torch.testing.assert_close(
                net(torch.from_numpy(alone))[0], together[row], atol=2e-5, rtol=1e-5
            )
            if not folded:
                plain.load_state_dict(net.state_dict())
                torch.testing.assert_close(
                    plain(torch.from_numpy(alone))[0], together[row], atol=2e-5, rtol=1e-5
                )


def test_the_input_statistics_leave_out_padding(task, batch):
    net = nets.create_net(Net(widths=[8]), task)
    net.fit_inputs(torch.from_numpy(batch))
    pixels = np.concatenate([image[:height] for image, height in zip(batch, HEIGHTS, strict=True)])
    pixels = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(net.mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(net.std, pixels.std(0, ddof=1), rtol=1e-5)
    more = np.pad(batch, [(0, 0), (0, 30), (0, 0), (0, 0)])
    again = nets.create_net(Net(widths=[8]), task)
    again.fit_inputs(torch.from_numpy(more))
    torch.testing.assert_close(again.stem.weight, net.stem.weight, atol=1e-5, rtol=1e-4)


def test_a_norm_is_torchs_over_what_is_not_padding(rng):
    x_BCHW = torch.from_numpy(rng.normal(2, 3, (4, 5, 7, 3))).float().requires_grad_()
    there_BH = torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    ours, theirs = RowNorm(5, momentum=0.15), nn.BatchNorm1d(5, momentum=0.15)
    weights = torch.from_numpy(rng.normal(size=(16 * 3, 5))).float()

    found = ours(x_BCHW, there_BH).permute(0, 2, 3, 1)[there_BH].flatten(0, 1)
    (ours_grad,) = torch.autograd.grad((found * weights).sum(), x_BCHW)
    expected = theirs(x_BCHW.permute(0, 2, 3, 1)[there_BH].flatten(0, 1))
    (theirs_grad,) = torch.autograd.grad((expected * weights).sum(), x_BCHW)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_padding_changes_neither_loss_nor_gradient(task, batch):
    torch.manual_seed(0)
    net = nets.create_net(Net(widths=[8, 6]), task).double()
    net.fit_inputs(torch.from_numpy(batch))
    wide = np.pad(batch, [(0, 0), (0, 25), (0, 0), (0, 0)])
    grads = []
    for given in (batch, wide):
        loss = F.cross_entropy(net(torch.from_numpy(given).double()), torch.tensor([0, 1, 2, 0, 1]))
        wanted = [each for each in net.parameters() if each.requires_grad]
        grads.append((loss, *torch.autograd.grad(loss, wanted)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_an_exported_net_accepts_any_height(task, batch, images, encoder, tmp_path):
    torch.manual_seed(0)
    net = trained_norms(nets.create_net(Net(widths=[8, 6, 5]), task))
    net.fit_inputs(torch.from_numpy(batch))
    net = nets.folded_net(net)
    export_onnx.to_onnx(net, task.features.inputs, {"picture": batch}, tmp_path / "net.onnx")
    engine = OnnxRuntimeEngine.load(tmp_path / "net.onnx", num_threads=1)
    together = engine.run({"picture": batch})["logits"]
    with torch.no_grad():
        expected = net(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(together, expected, atol=1e-4)
    for row, image in enumerate(images):
        alone = encoder.encode({"picture": [image]})
        np.testing.assert_allclose(engine.run(alone)["logits"][0], together[row], atol=1e-5)


def test_shifts_and_mirrors_stay_within_each_image(batch):
    heights_B = np.array(HEIGHTS)
    ids_B = np.arange(len(batch))
    config = Augment(flip=True, translate=3)
    augmentation = Augmentation(config, 5, len(batch), ("picture",))
    changed = 0
    for epoch in range(4):
        augmentation.start_epoch(epoch)
        together = augmentation.apply(torch.from_numpy(batch), ids_B, heights_B=heights_B).numpy()
        for row, height in enumerate(HEIGHTS):
            alone = torch.from_numpy(batch[row : row + 1, :height])
            expected = augmentation.apply(alone, ids_B[row : row + 1]).numpy()[0]
            np.testing.assert_array_equal(together[row, :height], expected)
            assert not together[row, height:].any()
            changed += not np.array_equal(expected, batch[row, :height])
    assert changed > 10


def test_an_image_that_is_too_small_for_the_blocks_is_refused(task):
    with pytest.raises(ValueError, match="images of 16×18 are too small"):
        nets.create_net(Net(widths=[8] * 4), task)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"cutout": 4}, "differ in height, so only augment.flip and augment.translate apply"),
        ({"stages": [{"until": 0.5, "scale": 0.5}, {"until": 1}]}, "differ in height"),
        ({"translate": LEAST_HEIGHT}, f"have {LEAST_HEIGHT} pixels a side"),
        ({"translate": LEAST_HEIGHT - 1, "flip": True}, None),
    ],
)
def test_augmentations_that_need_one_height_are_refused(rng, tmp_path, augment, words):
    rows = [
        {
            "picture": png(rng.integers(0, 250, (20 + number, 20, 3), np.uint8)),
            "y": "ab"[number % 2],
        }
        for number in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    config = make_config(
        data={"train": str(tmp_path / "train.parquet")},
        features={"picture": {"kind": "image", "size": (None, WIDTH)}},
        target="y",
        net={"widths": [8]},
        augment=augment,
        optim={"batch_size": 8},
        storage={"path": str(tmp_path / "runs")},
    )
    data = dataset.prepare_dataset(config, config.storage.path)
    if words is None:
        check_against_data(config, data)
        return
    with pytest.raises(UserError, match=words):
        check_against_data(config, data)
