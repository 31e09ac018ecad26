"""python -m train.pretrained: pickled weights become a checkpoint, and run no code."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import safetensors.torch
import torch

from cluster.errors import UserError
from tests.server import REPOSITORY
from tests.train.nets.pretrained_checkpoints import save_checkpoint, save_image_checkpoint
from train.nets.pretrained.hub import find_checkpoint
from train.pretrained.__main__ import main

pytestmark = pytest.mark.skipif(
    find_spec("timm") is None or find_spec("transformers") is None,
    reason="needs halyard[text,vision]",
)


def pickled(folder, name="pytorch_model.bin", **extra):
    """Replace the weights of a checkpoint by a pickle, and return them."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | extra, folder / name)
    return weights


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_transformers_is_converted(tmp_path):
    folder = save_checkpoint(tmp_path / "bert")
    weights = pickled(folder)
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    done = subprocess.run(
        [sys.executable, "-m", "train.pretrained", str(folder), "--to", str(tmp_path / "new")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = find_checkpoint(str(tmp_path / "new"))
    assert same(safetensors.torch.load_file(found.weights[0]), weights)
    assert (found.kind, found.licence) == ("text", "mit")
    assert json.loads(done.stdout)["sha256"] == found.digest


def test_a_file_of_timm_is_converted(tmp_path):
    folder = save_image_checkpoint(tmp_path / "timm", "test_resnet")
    weights = pickled(folder)
    file = tmp_path / "weights.pth"
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": weights[name] for name in weights}}, file
    )
    main([str(file), "--to", str(tmp_path / "new"), "--timm", "test_resnet"])
    found = find_checkpoint(str(tmp_path / "new"))
    assert found.kind == "image"
    assert same(safetensors.torch.load_file(found.weights[0]), weights)
    assert found.licence is None, "that of timm's own weights is not that of this file"


def test_weights_with_other_names_are_matched_by_order(tmp_path):
    from timm import create_model

    weights = create_model("test_resnet", num_classes=7).state_dict()
    file = tmp_path / "weights.pth"
    torch.save({f"_{number}": value for number, value in enumerate(weights.values())}, file)
    given = [str(file), "--to", str(tmp_path / "new"), "--timm", "test_resnet"]
    with pytest.raises(UserError, match=r"weights lack .*give --match-order"):
        main(given)
    main([*given, "--match-order"])
    found = safetensors.torch.load_file(tmp_path / "new/model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in found)
    values = list(weights.values())
    torch.save({f"_{number}": value for number, value in enumerate(values[1:])}, file)
    with pytest.raises(UserError, match=r"'_0' is \[.*\], and 'conv1.0.weight' of the model is"):
        main([*given[:2], str(tmp_path / "other"), *given[3:], "--match-order"])


class Evil:
    """Pickled as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_does_not_run(tmp_path, protocol):
    folder = save_checkpoint(tmp_path / "bert")
    ran = tmp_path / "ran"
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(weights | {"evil": Evil(ran)}, file, pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"cannot be read as weights: .*nsupported") as error:
        main([str(folder), "--to", str(tmp_path / "new")])
    assert "\n" not in str(error.value)
    assert not ran.exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04N."])
def test_files_that_hold_no_weights_are_refused(tmp_path, content):
    folder = save_checkpoint(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as weights") as error:
        main([str(folder), "--to", str(tmp_path / "new")])
    assert "\n" not in str(error.value)


def test_what_lacks_for_a_conversion_is_named(tmp_path):
    folder = save_checkpoint(tmp_path / "bert")
    with pytest.raises(UserError, match="does not exist"):
        main([str(tmp_path / "nothing"), "--to", str(tmp_path / "new")])
    with pytest.raises(UserError, match="has no pickled weights"):
        main([str(folder), "--to", str(tmp_path / "new")])
    pickled(folder)
    with pytest.raises(UserError, match="exists; give --to a new folder"):
        main([str(folder), "--to", str(folder)])
    with pytest.raises(UserError, match="give a folder that has one, or the name"):
        main([str(folder / "pytorch_model.bin"), "--to", str(tmp_path / "new")])
    with pytest.raises(UserError, match="'nothing', which timm does not know"):
        main([str(folder), "--to", str(tmp_path / "new"), "--timm", "nothing"])
    with pytest.raises(UserError, match=r"'resnet18\.nope', which timm does not know"):
        main([str(folder), "--to", str(tmp_path / "new"), "--timm", "resnet18.nope"])
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 24}))
    with pytest.raises(UserError, match="weights"):
        main([str(folder), "--to", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
