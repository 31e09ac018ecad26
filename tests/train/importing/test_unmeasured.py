"""ONNX files without records, Triton's repositories and TorchServe's archives, served by tensor."""

import json
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper, numpy_helper

from cluster.errors import UserError
from tests import server
from train.bundle import Bundle, Predictor, publishing
from train.bundle.__main__ import main
from train.config import validate_config
from train.importing.formats import find_model_file
from train.importing.repositories import parse_text_format
from train.importing.unmeasured import import_unmeasured
from train.tasks import InvalidRecord, Tensors, TensorSpec

CONFIG = """
# A model of two inputs.
name: "scorer"
platform: "onnxruntime_onnx"
max_batch_size: 32
input [
  { name: "pixels" data_type: TYPE_FP32 dims: [ 3, 4 ] },
  { name: "gain", data_type: TYPE_INT64, dims: 1 }
]
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 2 ] } ]
dynamic_batching { preferred_batch_size: [ 4, 16 ] max_queue_delay_microseconds: 500 }
instance_group [ { count: 2 kind: KIND_CPU } ]
"""


def write_model(path, *, batch=None, inner=3, output="scores"):
    """Write a model with two inputs: "pixels" float32 [N, 3, 4] and "gain" int64 [N, 1]."""
    weights = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    constants = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array([-1, 12]), "flat"),
    ]
    nodes = [
        helper.make_node("Reshape", ["pixels", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["plain"]),
        helper.make_node("Cast", ["gain"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["plain", "factor"], [output]),
    ]
    inputs = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, inner, 4]),
        helper.make_tensor_value_info("gain", TensorProto.INT64, [batch, 1]),
    ]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, 2])]
    graph = helper.make_graph(nodes, "scorer", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 18)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def write_repository(folder, config=CONFIG, versions=(1, 3), **options):
    folder.mkdir(parents=True)
    for version in versions:
        write_model(folder / str(version) / "model.onnx", **options)
    (folder / "config.pbtxt").write_text(config)
    return folder


def tensors(count=3):
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(count, 3, 4)).astype(np.float32)
    return {"pixels": pixels, "gain": rng.integers(1, 5, (count, 1))}


def imported(path, folder):
    values = {
        "name": "scorer",
        "data": {"train": str(path)},
        "storage": {"path": str(folder / "runs")},
        "compress": {"measure_seconds": 0.01},
    }
    config = validate_config(values)
    file = find_model_file(str(path), config.storage.root, folder, allow_pickle=False)
    return import_unmeasured(config, file), file


def test_a_model_without_records_is_served_by_its_tensors(tmp_path, capsys):
    path = write_model(tmp_path / "model.onnx")
    bundle, _ = imported(path, tmp_path)
    given = tensors(300)
    (wanted,) = onnxruntime.InferenceSession(path).run(None, given)
    predictor = Predictor.load(bundle)
    np.testing.assert_allclose(predictor.run_many(given)["scores"], wanted, rtol=1e-6)
    lists = [{name: array[row].tolist() for name, array in given.items()} for row in range(3)]
    np.testing.assert_allclose(predictor.predict(lists)["scores"], wanted[:3], rtol=1e-6)
    assert bundle.manifest.metrics == {}
    assert not bundle.task.is_measured
    assert bundle.quantities == {}
    assert bundle.manifest.variants["fp32"].reason == (
        "it was imported without records, so its accuracy is not known"
    )
    assert "its accuracy is not known, and drift is not monitored" in capsys.readouterr().err


def test_the_first_version_is_production_and_another_a_candidate(tmp_path, capsys):
    path = write_model(tmp_path / "model.onnx")
    options = [str(path), "--name", "scorer", "--storage.path", str(tmp_path / "runs")]
    first = main(["import", *options])
    assert first["alias"] == "production"
    assert first["metrics"] == {}
    assert main(["import", *options])["alias"] == "production"  # the same weights
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((12, 2), np.float32), "weights")
    )
    onnx.save(model, path)
    assert main(["import", *options])["alias"] == "candidate"
    assert "it has no metrics to compare with those of version 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1.0] * 4] * 2, r"has the shape \[2, 4\]; expected FP32 of the shape \[3, 4\]"),
        (None, "is missing"),
        ("text", "is 'text'"),
        ([[1.0] * 4, [1.0] * 3, [1.0] * 4], "has rows of several lengths"),
        ([[True] * 4] * 3, "is "),
    ],
)
def test_a_wrong_tensor_is_named(value, words):
    encoder = Tensors((TensorSpec("pixels", "FP32", (3, 4)),))
    good = [[0.0] * 4] * 3
    with pytest.raises(InvalidRecord, match=words) as raised:
        encoder.encode({"pixels": [good, value]})
    assert raised.value.row == 1


def test_integers_are_not_cut_to_fit():
    encoder = Tensors((TensorSpec("codes", "INT8", (2,)), TensorSpec("mask", "BOOL", ())))
    found = encoder.encode({"codes": [[1, -5]], "mask": [True]})
    assert found["codes"].dtype == np.int8
    for codes in ([1, 200], [1, 1.5]):
        with pytest.raises(InvalidRecord, match="expected INT8"):
            encoder.encode({"codes": [codes], "mask": [True]})
    with pytest.raises(InvalidRecord, match="is FP64; expected INT8"):
        encoder.encode({"codes": np.zeros((1, 2)), "mask": [True]})


def test_a_folder_of_triton_is_imported_with_its_options(tmp_path):
    folder = write_repository(tmp_path / "models" / "scorer")
    bundle, file = imported(folder, tmp_path)
    assert file.path == folder / "3" / "model.onnx"
    assert list(file.options) == [
        "batching.max_rows=16",
        "batching.wait_ms=0.5",
        "limits.max_rows=32",
        "replicas=2",
    ]
    assert [each.name for each in bundle.manifest.inputs] == ["pixels", "gain"]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (CONFIG.replace('"scores"', '"logits"'), {}, r"has the output 'logits', and the file has"),
        (CONFIG.replace("[ 3, 4 ]", "[ 3, 5 ]"), {}, r"'pixels' as TYPE_FP32 \[-1, 3, 5\]"),
        (CONFIG.replace("TYPE_INT64", "TYPE_INT32"), {}, r"'gain' as TYPE_INT32"),
        (CONFIG.replace("onnxruntime_onnx", "tensorrt_plan"), {}, "needs Triton's tensorrt"),
        (CONFIG.replace("onnxruntime_onnx", "ensemble"), {}, "needs Triton's ensemble"),
        (CONFIG + "sequence_batching { }", {}, "has sequence_batching"),
        (CONFIG + "}", {}, "cannot be read: '}' is not the name of a field"),
        (CONFIG + "parameters {", {}, "cannot be read: it ends early"),
        (CONFIG + "name = 3", {}, "cannot be read: line 13 is malformed"),
        (CONFIG + "version_policy { specific { versions: [ 2 ] } }", {}, "no folder of a version"),
        (CONFIG, {"versions": ()}, "no folder of a version"),
        (CONFIG.replace("32\n", "0\n", 1), {}, r"'pixels' as TYPE_FP32 \[3, 4\]"),
        (CONFIG, {"batch": 1}, r"file has TYPE_FP32 \[1, 3, 4\]"),
    ],
)
def test_a_configuration_without_equivalent_is_refused(config, options, words, tmp_path):
    folder = write_repository(tmp_path / "models" / "scorer", config, **options)
    with pytest.raises(UserError, match=words) as raised:
        imported(folder, tmp_path)
    assert "\n" not in str(raised.value)


def test_the_version_that_the_policy_names_is_taken(tmp_path):
    policy = "version_policy { specific { versions: [ 1, 2 ] } }"
    folder = write_repository(tmp_path / "scorer", CONFIG + policy)
    assert imported(folder, tmp_path)[1].path == folder / "1" / "model.onnx"


def test_a_whole_repository_lists_its_models(tmp_path):
    for name in ("one", "two"):
        write_repository(tmp_path / "models" / name)
    with pytest.raises(UserError, match=r"with the models one, two; give the folder of one"):
        imported(tmp_path / "models", tmp_path)


def test_the_text_format_of_protobuf():
    text = 'a: "x # no comment \\" y" # comment\nb { c: [1, -2.5] c: 3; d: true }\nb { } e: WORD'
    assert parse_text_format(text) == {
        "a": ['x # no comment " y'],
        "b": [{"c": [1, -2.5, 3], "d": [True]}, {}],
        "e": ["WORD"],
    }


def archive(path, serialized, content):
    with zipfile.ZipFile(path, "w") as files:
        model = {"modelName": "scorer", "modelVersion": "1.0", "serializedFile": serialized}
        files.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
        files.writestr(serialized, content)
    return path


def test_an_archive_of_torchserve_is_imported(tmp_path):
    content = write_model(tmp_path / "scorer.onnx").read_bytes()
    bundle, _ = imported(archive(tmp_path / "scorer.mar", "scorer.onnx", content), tmp_path)
    assert [each.name for each in bundle.manifest.outputs] == ["scores"]
    with pytest.raises(UserError, match=r"holds 'scorer\.pt', which needs the code of its model"):
        imported(archive(tmp_path / "code.mar", "scorer.pt", b"weights"), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 4}, r"'pixels' has a fixed batch of 4"),
        ({"inner": None}, r"'pixels' has the shape \[batch, \?, 4\]"),
        ({"inner": 5}, "does not run on random tensors"),
    ],
)
def test_a_model_that_cannot_be_batched_is_refused(options, words, tmp_path):
    path = write_model(tmp_path / "model.onnx", **options)
    with pytest.raises(UserError, match=words):
        imported(path, tmp_path)


def test_options_that_do_not_go_together_are_refused(tmp_path):
    path = write_model(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="--data and --target go together"):
        main(["import", str(path), "--name", "scorer", "--target", "y"])
    (tmp_path / "model.txt").write_text("tree\nversion=v4\n")
    with pytest.raises(UserError, match=r"is of the format LightGBM.*give records with --data"):
        main(["import", str(tmp_path / "model.txt"), "--name", "scorer"])


@pytest.mark.slow
@pytest.mark.ray
def test_tritonclient_uses_an_imported_repository(tmp_path):
    folder = write_repository(tmp_path / "models" / "scorer")
    storage = str(tmp_path / "runs")
    bundle, _ = imported(folder, tmp_path)
    config = {"name": "scorer"}
    with publishing.RunRecorder(storage, "scorer", config) as recording:
        publishing.publish(Bundle.load(bundle.location), recording, storage, None)
    given = tensors()
    path = folder / "3" / "model.onnx"
    (wanted,) = onnxruntime.InferenceSession(path).run(None, given)
    arguments = ["model=models:/scorer@production", f"storage={storage}"]
    with server.running(*arguments, log=tmp_path / "serve.log"):
        for module, address in (
            (tritonclient.http, "127.0.0.1:8000"),
            (tritonclient.grpc, "127.0.0.1:9000"),
        ):
            client = module.InferenceServerClient(address)
            inputs = []
            for name, array in given.items():
                datatype = "FP32" if array.dtype == np.float32 else "INT64"
                inputs.append(module.InferInput(name, array.shape, datatype))
                inputs[-1].set_data_from_numpy(array)
            found = client.infer("scorer", inputs).as_numpy("scores")
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
            assert client.is_model_ready("scorer")
            client.unload_model("scorer")
            assert not client.is_model_ready("scorer")
            client.load_model("scorer")
            assert client.is_model_ready("scorer")
            index = client.get_model_repository_index()
            names = (
                [each["name"] for each in index]
                if isinstance(index, list)
                else [each.name for each in index.models]
            )
            assert names == ["scorer"]
