"""Pretrained image encoders: the features of transformers and timm, in training and in ONNX."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from tests.train.nets.pretrained_checkpoints import (
    IMAGE_ARCHITECTURES,
    MEAN,
    SIDE,
    STD,
    TIMM_ARCHITECTURES,
    save_image_checkpoint,
)
from train import nets
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.recipes import export_onnx
from train.config import Net
from train.nets.pretrained.backbones import read_weights
from train.nets.pretrained.encoder import layers_of
from train.nets.pretrained.hub import find_checkpoint
from train.nets.pretrained.image import PretrainedImage
from train.tasks import ClassTarget, Features, Images, Task

pytestmark = pytest.mark.skipif(find_spec("timm") is None, reason="needs halyard[vision]")


@pytest.fixture(scope="module", params=[*IMAGE_ARCHITECTURES, *TIMM_ARCHITECTURES])
def checkpoint(request, tmp_path_factory):
    folder = save_image_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return find_checkpoint(str(folder))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return find_checkpoint(str(save_image_checkpoint(tmp_path_factory.mktemp("vit"))))


def pictures(checkpoint, count=3, channels=3):
    height, width = checkpoint.image["size"]
    draws = np.random.default_rng(0)
    return draws.integers(0, 256, (count, height, width, channels), np.uint8)


def encoder_of(checkpoint, freeze="none"):
    size = tuple(checkpoint.image["size"])
    encoder = PretrainedImage(checkpoint.architecture, checkpoint.image, size, freeze)
    encoder.load_backbone(read_weights(checkpoint))
    return encoder.eval()


def reference(checkpoint, images_BHWC):
    """The features by the library alone, of images normalised by numpy, float32 [B, D]."""
    normal_BHWC = (images_BHWC / 255 - np.array(MEAN)) / np.array(STD)
    x_BCHW = torch.from_numpy(normal_BHWC.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        if "timm" in checkpoint.architecture:
            import timm

            path = checkpoint.folder / "model.safetensors"
            name = checkpoint.architecture["timm"]
            net = timm.create_model(name, num_classes=7, checkpoint_path=str(path)).eval()
            return net.forward_head(net.forward_features(x_BCHW), pre_logits=True)
        from transformers import AutoModel

        outputs = AutoModel.from_pretrained(checkpoint.folder).eval()(x_BCHW)
        if outputs.last_hidden_state.ndim == 3:
            return outputs.last_hidden_state[:, 0]
        return outputs.pooler_output.flatten(1)


def test_the_features_are_those_of_the_library(checkpoint):
    images = pictures(checkpoint)
    with torch.no_grad():
        found = encoder_of(checkpoint)(torch.from_numpy(images))
    expected = reference(checkpoint, images)
    assert expected.std(dim=0).max() > 1e-3 * expected.abs().max(), "the images differ"
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=1e-4)


def test_grey_images_are_three_equal_channels(checkpoint):
    grey = pictures(checkpoint, channels=1)
    encoder = encoder_of(checkpoint)
    with torch.no_grad():
        found = encoder(torch.from_numpy(grey))
        expected = encoder(torch.from_numpy(np.repeat(grey, 3, axis=3)))
    torch.testing.assert_close(found, expected)


def test_an_exported_net_has_equal_outputs(checkpoint, tmp_path):
    images = Images("photo", size=tuple(checkpoint.image["size"]), channels=3)
    task = Task(Features((images,)), ClassTarget("y").fit(["a", "b"]))
    net = nets.create_net(Net(pretrained="x", checkpoint=checkpoint.facts), task)
    net.encoders[0].load_backbone(read_weights(checkpoint))
    torch.nn.init.normal_(net.head.weight, std=0.1)
    net = nets.folded_net(net)
    inputs = {"photo": pictures(checkpoint, 5)}
    export_onnx.to_onnx(net, task.features.inputs, inputs, tmp_path / "net.onnx")
    engine = OnnxRuntimeEngine.load(tmp_path / "net.onnx", num_threads=1)
    with torch.no_grad():
        expected = net(torch.from_numpy(inputs["photo"])).numpy()
    np.testing.assert_allclose(engine.run(inputs)["logits"], expected, atol=1e-4, rtol=1e-4)
    alone = {"photo": inputs["photo"][2:3]}
    np.testing.assert_allclose(engine.run(alone)["logits"], expected[2:3], atol=1e-4, rtol=1e-4)


def test_the_layers_are_the_outermost_blocks(checkpoint):
    kind = checkpoint.architecture.get("timm") or checkpoint.architecture["model_type"]
    layers = layers_of(encoder_of(checkpoint).backbone)
    if kind in ("vit", "convnext", "resnet"):
        assert len(layers) == {"vit": 3, "convnext": 4, "resnet": 2}[kind]
    encoder = encoder_of(checkpoint, freeze=1)
    frozen = {id(param) for param, _ in encoder.depths() if not param.requires_grad}
    first = {id(param) for param in layers_of(encoder.backbone)[0].parameters()}
    last = {id(param) for param in layers_of(encoder.backbone)[-1].parameters()}
    assert first <= frozen
    assert not last & frozen
    before = [id(param) for param in encoder.backbone.parameters()]
    assert set(before[: max(map(before.index, first)) + 1]) <= frozen


def test_batch_norms_keep_their_statistics(checkpoint):
    encoder = encoder_of(checkpoint)
    before = {name: value.clone() for name, value in encoder.backbone.named_buffers()}
    encoder.train()(torch.from_numpy(pictures(checkpoint)))
    for name, value in encoder.backbone.named_buffers():
        assert torch.equal(value, before[name]), name


def test_an_image_checkpoint_is_described(checkpoint):
    assert (checkpoint.kind, checkpoint.licence) == ("image", "mit")
    np.testing.assert_allclose(checkpoint.image["mean"], MEAN)
    np.testing.assert_allclose(checkpoint.image["std"], STD)


@pytest.mark.parametrize(
    ("facts", "size", "mean"),
    [
        ({"size": 40, "image_mean": [0.5], "image_std": [1]}, [40, 40], [0.5]),
        (
            {"size": {"shortest_edge": 40}, "image_mean": [0.5], "image_std": [1]},
            [40, 40],
            [0.5],
        ),
        (
            {
                "size": {"shortest_edge": 48},
                "do_center_crop": True,
                "crop_size": {"height": 40, "width": 36},
                "image_mean": [127.5],
                "image_std": [127.5],
                "do_rescale": False,
            },
            [40, 36],
            [0.5],
        ),
        ({"size": 40, "do_normalize": False}, [40, 40], [0.0, 0.0, 0.0]),
        (
            {
                "image_processor_type": "EfficientNetImageProcessor",
                "size": 40,
                "image_mean": [0.5],
                "image_std": [0.5],
            },
            [40, 40],
            [0.5],
        ),
    ],
)
def test_forms_of_a_preprocessor(vit, tmp_path, facts, size, mean):
    for path in vit.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    found = find_checkpoint(str(tmp_path)).image
    assert found["size"] == size
    np.testing.assert_allclose(found["mean"], mean)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "gives no size of images"),
        ({"size": 40}, "gives no mean and standard deviation"),
        (None, "has no preprocessor_config.json"),
        ({"size": 40, "rescale_offset": True}, "rescale_offset is not supported"),
        (
            {"size": 40, "image_mean": [1], "image_std": [1], "rescale_factor": 0},
            "cannot be used: ZeroDivisionError",
        ),
    ],
)
def test_an_incomplete_preprocessor_is_refused(vit, tmp_path, facts, words):
    for path in vit.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    if facts is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=words) as error:
        find_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


def test_images_of_a_size_that_does_not_fit_are_refused(vit):
    with pytest.raises(
        ValueError, match=f"does not accept images of 20×20.*{SIDE}×{SIDE}"
    ) as error:
        PretrainedImage(vit.architecture, vit.image, (20, 20), "none")
    assert "\n" not in str(error.value)


def test_images_that_differ_in_height_are_refused(vit):
    images = Images("photo", size=(None, 32), channels=3)
    task = Task(Features((images,)), ClassTarget("y").fit(["a", "b"]))
    with pytest.raises(ValueError, match="needs images of one size"):
        nets.create_net(Net(pretrained="x", checkpoint=vit.facts), task)


def test_a_text_encoder_is_not_one_of_images():
    with pytest.raises(ValueError, match="'bert', which is not an encoder of images"):
        PretrainedImage({"model_type": "bert"}, {"mean": [0], "std": [1]}, (8, 8), "none")


def test_the_preparation_equals_that_of_transformers(vit, tmp_path):
    from transformers import EfficientNetImageProcessorPil

    for path in vit.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    processor = EfficientNetImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(tmp_path)
    facts = find_checkpoint(str(tmp_path)).image
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = (image / 255 - np.array(facts["mean"])) / np.array(facts["std"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:some/repository"},
        {"model_args": {"pretrained": True}},
        {"model_args": {"checkpoint_path": "/etc/hostname"}},
        {"model_args": {"pretrained_cfg": {"url": "http://127.0.0.1:1/x"}}},
    ],
)
def test_a_config_cannot_name_other_files(changes, tmp_path):
    folder = save_image_checkpoint(tmp_path, "test_resnet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match="refers to files outside its folder"):
        find_checkpoint(str(folder))
    (folder / "config.json").write_text(
        json.dumps({**config, "model_args": {"num_classes": 7, "in_chans": 3}})
    )
    encoder_of(find_checkpoint(str(folder)))
