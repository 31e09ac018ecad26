"""The command `python -m train.compress`, as a user runs it; wrong input, in this process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import call_command
from tests.server import REPOSITORY
from train.compress.__main__ import main


def run_compress(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "train.compress", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def production(root):
    from train.bundle import registry

    return registry.resolve_model("models:/digits@production", str(root))


@pytest.mark.ray
def test_a_refused_variant_leaves_production_unchanged(bundle, storage_path, tmp_path):
    model = onnx.load(bundle.path / bundle.manifest.variants["fp32"].file)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2:
            scaled = numpy_helper.to_array(tensor) * np.float32(0.6)
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    onnx.save(model, tmp_path / "scaled.onnx")
    before = production(storage_path)
    done = run_compress(
        *("add", "models:/digits@production", "--variant", "scaled"),
        *("--onnx", str(tmp_path / "scaled.onnx"), "--storage.path", str(storage_path)),
        *("--compress.measure_seconds", "0.1"),
    )
    assert done.returncode == 1, done.stderr
    assert "no variant was accepted" in done.stderr
    assert "scaled: predictions differ from fp32" in done.stderr
    assert "accuracy 0." in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert production(storage_path) == before


@pytest.mark.ray
def test_the_default_is_chosen_again_without_new_variants(bundle, storage_path, tmp_path):
    done = run_compress(
        *("models:/digits@production", "--storage.path", str(storage_path)),
        *("--compress.optimize_for", "size", "--compress.measure_seconds", "0.1"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    sizes = {
        name: entry["bytes"] for name, entry in result["variants"].items() if entry["accepted"]
    }
    assert sizes[result["default_variant"]] == min(sizes.values())
    assert result["alias"] == "production"
    again = Path(result["bundle"])
    for name, entry in bundle.manifest.variants.items():
        assert (again / entry.file).read_bytes() == (bundle.path / entry.file).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models:/nothing@production"], "models:/nothing@production"),
        (["MODEL", "--optim.lr", "0.1"], "--optim applies to training only"),
        (["MODEL", "--compress.variants", "[int4]"], "compress.variants"),
        (
            ["add", "MODEL", "--variant", "x", "--onnx", "none.onnx"],
            "'none.onnx', which is not a file",
        ),
        (
            ["add", "MODEL", "--variant", "fp32", "--onnx", "README.md"],
            "already has a variant 'fp32'",
        ),
        (
            ["add", "MODEL", "--variant", "../x", "--onnx", "README.md"],
            "'../x'; expected lowercase",
        ),
        (["MODEL", "--compress.calibration_records", "5"], "there are 10 classes"),
        (["export", "MODEL", "--to", "/proc/nothing"], "cannot be written"),
        (["export", "MODEL", "--to", "x", "--variant", "int4"], "'int4' cannot be exported"),
    ],
)
def test_wrong_input_exits_2_without_a_traceback(
    bundle, storage_path, arguments, words, monkeypatch, capfd
):
    given = [str(bundle.path) if each == "MODEL" else each for each in arguments]
    status = call_command(main, [*given, "--storage.path", str(storage_path)], monkeypatch)
    printed = capfd.readouterr()
    assert status == 2, printed.err
    assert words in printed.err
    assert "Traceback" not in printed.err
