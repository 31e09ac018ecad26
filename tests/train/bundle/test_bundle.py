"""Bundles: written completely or not at all, checked by digest, reproducing golden outputs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from train.bundle import Bundle, CorruptBundle, Predictor, engines
from train.bundle import manifest as manifests
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.bundle.manifest import FORMAT_VERSION, rank_variants
from train.compress.variant_judge import golden_records
from train.data.dataset import EncodedDataset
from train.values.ragged import Ragged, row_lengths


@pytest.fixture
def copy(bundle, tmp_path):
    """A copy of the bundle that a test may damage."""
    path = tmp_path / "copy"
    shutil.copytree(bundle.path, path)
    return path


def test_the_manifest_lists_files_tensors_and_variants(bundle):
    manifest = bundle.manifest
    on_disk = {
        path.relative_to(bundle.path).as_posix()
        for path in bundle.path.rglob("*")
        if path.is_file()
    }
    assert on_disk == {*manifest.files, manifests.FILENAME}
    assert {tensor.name: (tensor.datatype, tensor.shape) for tensor in manifest.inputs} == {
        "image": ("UINT8", [-1, 8, 8, 1])
    }
    assert [tensor.name for tensor in manifest.outputs] == ["label", "probabilities"]
    assert manifest.variants["fp32"].accepted
    assert manifest.default_variant in manifest.variants


def test_no_file_of_a_bundle_is_a_pickle(bundle):
    for name in bundle.manifest.files:
        start = (bundle.path / name).read_bytes()[:2]
        assert start != b"\x80\x04", name
        assert not (name.endswith(".npz") and start != b"PK"), name


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_the_error_names_a_damaged_file(copy, damage):
    file = copy / "weights.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(CorruptBundle, match=r"weights\.safetensors"):
        Bundle.load(str(copy))


@pytest.mark.parametrize("damage", ["absent", "no JSON", "unknown field", "newer format"])
def test_an_invalid_manifest_is_refused(copy, damage):
    file = copy / manifests.FILENAME
    values = json.loads(file.read_text())
    if damage == "absent":
        file.unlink()
    elif damage == "no JSON":
        file.write_text("{")
    elif damage == "unknown field":
        file.write_text(json.dumps({**values, "surprise": 1}))
    else:
        file.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(CorruptBundle) as caught:
        Bundle.load(str(copy))
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_name_a_file_outside_the_bundle(copy):
    file = copy / manifests.FILENAME
    values = json.loads(file.read_text())
    values["files"]["../outside"] = values["files"]["features.json"]
    file.write_text(json.dumps(values))
    shutil.copy(copy / "features.json", copy.parent / "outside")
    with pytest.raises(CorruptBundle, match="outside"):
        Bundle.load(str(copy))


@pytest.mark.parametrize("name", ["variants/fp32/model.onnx", "golden.npz", "features.json"])
def test_a_required_file_without_a_digest_is_refused(copy, name):
    file = copy / manifests.FILENAME
    values = json.loads(file.read_text())
    del values["files"][name]
    file.write_text(json.dumps(values))
    with pytest.raises(CorruptBundle, match=name):
        Bundle.load(str(copy))


@pytest.mark.parametrize("name", ["variants/fp32/more.data", "baseline.json", "link"])
def test_a_file_not_listed_in_the_manifest_is_refused(copy, name):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"].pop(name, None)
    path.write_text(json.dumps(manifest))
    if name == "link":
        (copy / name).symlink_to("/etc/hostname")
    elif name != "baseline.json":
        (copy / name).write_bytes(b"weights")
    with pytest.raises(CorruptBundle, match="is not listed in"):
        Bundle.load(str(copy))


def test_an_interrupted_write_leaves_no_files(tmp_path):
    target = tmp_path / "bundles" / "one"

    def write():
        with Bundle.create(str(target)) as writer:
            writer.json("features.json", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list((tmp_path / "bundles").iterdir()) == []


@pytest.mark.parametrize("variant", ["fp32", "int8_static"])
def test_the_golden_outputs_are_reproduced(bundle, variant):
    predictor = Predictor.load(bundle, variant)
    inputs, expected = bundle.golden(variant)
    np.testing.assert_allclose(
        predictor.engine.run(inputs)["logits"], expected["logits"], rtol=1e-5, atol=1e-5
    )


class Wrong(OnnxRuntimeEngine):
    """Engine with wrong outputs, as on a processor that computes something else."""

    def run(self, inputs):
        return {name: array + 1e3 for name, array in super().run(inputs).items()}


def test_an_engine_with_wrong_golden_outputs_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(engines, "find_engine", lambda name: Wrong)
    with pytest.raises(CorruptBundle, match="golden"):
        Predictor.load(bundle)


class Slow(OnnxRuntimeEngine):
    """Slow engine, as on a processor that lacks instructions for a variant."""

    def run(self, inputs):
        for _ in range(29):
            super().run(inputs)
        return super().run(inputs)


@pytest.fixture(scope="module")
def int8_bundle(bundle):
    """The bundle with int8_static as its default, whichever variant was the fastest here."""
    manifest = bundle.manifest.model_copy(update={"default_variant": "int8_static"})
    assert manifest.variants["int8_static"].accepted
    return replace(bundle, manifest=manifest)


@pytest.fixture
def run_by(bundle, monkeypatch):
    """A function that makes one variant of the bundle run on another engine."""

    def run_by(variant, kind):
        file = bundle.manifest.variants[variant].file

        class Chosen(OnnxRuntimeEngine):
            @classmethod
            def load(cls, path, *, num_threads):
                found = kind if str(path).endswith(file) else OnnxRuntimeEngine
                return found.load(path, num_threads=num_threads)

        monkeypatch.setattr(engines, "find_engine", lambda name: Chosen)

    return run_by


def test_a_variant_with_wrong_outputs_falls_back_to_the_next(bundle, run_by, caplog):
    manifest = bundle.manifest
    default = manifest.default_variant
    run_by(default, Wrong)
    predictor = Predictor.load(bundle)
    accepted = rank_variants(manifest.variants, manifest.optimize_for)
    assert predictor.variant == next(name for name in accepted if name != default)
    assert f"'{default}'" in caplog.text
    with pytest.raises(CorruptBundle, match="golden"):
        Predictor.load(bundle, default)


@pytest.mark.parametrize(
    ("optimize_for", "served"), [("throughput", "fp32"), ("latency", "fp32"), ("size", None)]
)
def test_fp32_is_served_if_the_default_is_slower(int8_bundle, run_by, caplog, optimize_for, served):
    default = int8_bundle.manifest.default_variant
    run_by(default, Slow)
    manifest = int8_bundle.manifest.model_copy(update={"optimize_for": optimize_for})
    found = Predictor.load_fastest(replace(int8_bundle, manifest=manifest)).variant
    assert found == (served or default)
    assert ("fp32 is served" in caplog.text) == (served == "fp32")
    assert Predictor.load_fastest(int8_bundle, default).variant == default


def test_the_default_is_served_if_it_is_faster(int8_bundle, run_by, caplog):
    run_by("fp32", Slow)
    assert Predictor.load_fastest(int8_bundle).variant == "int8_static"
    assert not caplog.text


def test_the_default_is_served_if_fp32_gives_wrong_outputs(int8_bundle, run_by, caplog):
    run_by("fp32", Wrong)
    assert Predictor.load_fastest(int8_bundle).variant == "int8_static"
    assert "'fp32'" in caplog.text


def test_golden_records_include_the_largest_numbers(rng):
    numbers = rng.normal(size=(100, 3)).astype(np.float32)
    numbers[50, 0] = np.nan
    inputs = {
        "image": rng.integers(50, 200, (100, 4, 4, 1), dtype=np.uint8),
        "numbers": numbers,
        "codes": rng.integers(0, 5, (100, 2)),
    }
    golden = golden_records(inputs)
    assert {len(array) for array in golden.values()} == {16}
    for name, array in inputs.items():
        np.testing.assert_array_equal(golden[name][:8], array[:8])
        assert golden[name].dtype == array.dtype
    assert golden["image"][8:].min() == 0
    assert golden["image"][8:].max() == 255
    heights_N = rng.integers(2, 9, 100)
    values = rng.integers(50, 200, (heights_N.sum(), 4, 1), dtype=np.uint8)
    free = Ragged(values, np.concatenate([[0], np.cumsum(heights_N)]))
    golden_free = golden_records({"image": free})["image"]
    np.testing.assert_array_equal(golden_free[:8], free[:8])
    assert set(np.unique(golden_free[8:])) == {0, 1, 255}
    np.testing.assert_array_equal(row_lengths(golden_free[8:]), -(-heights_N[:8] // 2))
    known = np.where(np.isnan(numbers), 0, numbers)
    np.testing.assert_array_equal(golden["numbers"][8:10], [known.min(0), known.max(0)])


def test_a_default_refused_by_the_gate_is_not_served(bundle):
    manifest = bundle.manifest
    name = manifest.default_variant
    refused = manifest.variants[name].model_copy(update={"verdict": "refused"})
    changed = manifest.model_copy(update={"variants": {**manifest.variants, name: refused}})
    assert Predictor.load(replace(bundle, manifest=changed)).variant != name
    with pytest.raises(ValueError, match="was refused by the gate"):
        Predictor.load(replace(bundle, manifest=changed), name)


def test_a_bundle_with_an_old_format_is_refused(bundle, tmp_path):
    copy = tmp_path / "old"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    words = f"has format 2; this version reads {FORMAT_VERSION}"
    with pytest.raises(CorruptBundle, match=words):
        Bundle.load(str(copy))


def test_the_error_for_an_unknown_variant_lists_the_known_ones(bundle):
    with pytest.raises(ValueError, match=r"'int4' is unknown; 'digits' has fp32, int8_dyn"):
        Predictor.load(bundle, "int4")


@pytest.mark.parametrize("variant", ["fp32", "int8_static"])
def test_predictions_do_not_depend_on_the_batch(bundle, trained, variant):
    predictor = Predictor.load(bundle, variant)
    inputs, _ = EncodedDataset(*shards_of(bundle, trained)).open("test")
    whole = predictor.run({name: array[:64] for name, array in inputs.items()})
    for size in (1, 7):
        part = predictor.run({name: array[:size] for name, array in inputs.items()})
        np.testing.assert_allclose(part["probabilities"], whole["probabilities"][:size], atol=1e-5)
        assert part["label"].tolist() == whole["label"][:size].tolist()


def shards_of(bundle, trained):
    """Return the URL and the summary of the run's encoded data, found through its config."""
    from train import config as configs
    from train.data import dataset

    config = configs.validate_config(bundle.manifest.config)
    prepared = dataset.prepare_dataset(config, config.storage.path)
    return prepared.url, prepared.summary
