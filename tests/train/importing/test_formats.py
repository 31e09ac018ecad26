"""Files of every format are recognized and imported; bad ones are refused in one line."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import onnx
import pandas as pd
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cluster.errors import UserError
from tests.train.importing.test_importer import check_predictions, imported, records
from train.bundle import Predictor
from train.importing.formats import find_model_file

pytest.importorskip("skl2onnx", reason="needs halyard[import]")


@pytest.fixture(scope="module")
def cancer():
    """Records of two classes, as a data frame with the target in the column "diagnosis"."""
    features, target = load_breast_cancer(return_X_y=True, as_frame=True)
    return features.assign(diagnosis=target.map({0: "malignant", 1: "benign"}))


def split(frame, target):
    """Return features and target to train on, and the sample to import with."""
    return frame[1::2].drop(columns=[target]), frame[1::2][target], frame[::2]


@pytest.mark.parametrize("suffix", ["json", "ubj", "pkl"])
def test_xgboost(suffix, cancer, tmp_path):
    xgboost = pytest.importorskip("xgboost")
    features, target, sample = split(cancer, "diagnosis")
    features = features.mask(np.random.default_rng(0).random(features.shape) < 0.05)
    codes = (target == "malignant").astype(int)  # XGBoost knows classes by number only
    model = xgboost.XGBClassifier(n_estimators=40).fit(features, codes)
    path = tmp_path / f"model.{suffix}"
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(model))
    else:
        model.save_model(path)
    bundle = imported(path, sample, "diagnosis", tmp_path)
    wanted = model.predict_proba(sample.drop(columns=["diagnosis"]))
    found = Predictor.load(bundle, "fp32").predict(records(sample, "diagnosis"))
    assert bundle.task.target.classes == ("benign", "malignant")
    np.testing.assert_allclose(found["probabilities"], wanted, rtol=0, atol=1e-5)
    labels = np.array(["benign", "malignant"])[model.predict(sample.drop(columns=["diagnosis"]))]
    assert found["label"].tolist() == labels.tolist()


def test_xgboost_stops_at_its_best_round(tmp_path):
    xgboost = pytest.importorskip("xgboost")
    features, target = load_diabetes(return_X_y=True, as_frame=True)
    model = xgboost.XGBRegressor(n_estimators=300, early_stopping_rounds=5)
    model.fit(features[::2], target[::2], eval_set=[(features[1::2], target[1::2])], verbose=False)
    assert model.best_iteration < 250
    model.save_model(tmp_path / "model.json")
    sample = features.assign(target=target)[1::2]
    bundle = imported(tmp_path / "model.json", sample, "target", tmp_path)
    check_predictions(bundle, model, sample, "target")


@pytest.mark.parametrize("suffix", ["txt", "pkl"])
def test_lightgbm(suffix, cancer, tmp_path):
    lightgbm = pytest.importorskip("lightgbm")
    features, target, sample = split(cancer, "diagnosis")
    model = lightgbm.LGBMClassifier(n_estimators=40, verbose=-1)
    path = tmp_path / f"model.{suffix}"
    if suffix == "pkl":
        model.fit(features, target)
        path.write_bytes(pickle.dumps(model))
    else:
        model.fit(features, (target == "malignant").astype(int)).booster_.save_model(path)
    bundle = imported(path, sample, "diagnosis", tmp_path)
    wanted = model.predict_proba(sample.drop(columns=["diagnosis"]))
    found = Predictor.load(bundle, "fp32").predict(records(sample, "diagnosis"))
    np.testing.assert_allclose(found["probabilities"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flavor", ["cloudpickle", "skops", "xgboost"])
def test_a_folder_that_mlflow_wrote(flavor, cancer, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    features, target, sample = split(cancer, "diagnosis")
    if flavor != "xgboost":
        model = LogisticRegression(max_iter=5000).fit(features, target)
        mlflow.sklearn.save_model(model, tmp_path / "model", serialization_format=flavor)
    else:
        xgboost = pytest.importorskip("xgboost")
        model = xgboost.XGBClassifier(n_estimators=20).fit(features, target == "malignant")
        mlflow.xgboost.save_model(model, tmp_path / "model")
    bundle = imported(tmp_path / "model", sample, "diagnosis", tmp_path)
    wanted = model.predict_proba(sample.drop(columns=["diagnosis"]))
    found = Predictor.load(bundle, "fp32").predict(records(sample, "diagnosis"))
    np.testing.assert_allclose(found["probabilities"], wanted, rtol=0, atol=1e-5)


def linear(path, *, width=30, softmax=True, batch=None, **changes):
    """Write an ONNX model of two classes, and return its weights, float32 [F, 2]."""
    weights = np.random.default_rng(0).normal(0, 1e-3, (width, 2)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["features", "weights"], ["scores"])]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1))
    nodes += changes.get("nodes", [])
    output = "probabilities" if softmax else "scores"
    graph = helper.make_graph(
        nodes,
        "linear",
        changes.get(
            "inputs", [helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, width])]
        ),
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(weights, "weights")],
    )
    opsets = [helper.make_opsetid("", 18), *changes.get("opsets", [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, path, **changes.get("saving", {}))
    return weights


@pytest.mark.parametrize("softmax", [True, False], ids=["probabilities", "scores"])
def test_an_onnx_file(softmax, cancer, tmp_path):
    weights = linear(tmp_path / "model.onnx", softmax=softmax)
    sample = cancer[::2]
    bundle = imported(tmp_path / "model.onnx", sample, "diagnosis", tmp_path)
    features = sample.drop(columns=["diagnosis"]).to_numpy(np.float32)
    scores = features @ weights
    wanted = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
    found = Predictor.load(bundle, "fp32").predict(records(sample, "diagnosis"))
    np.testing.assert_allclose(found["probabilities"], wanted, rtol=0, atol=1e-5)


def test_weights_beside_an_onnx_file_become_part_of_it(cancer, tmp_path):
    saving = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    linear(tmp_path / "model.onnx", saving=saving)
    assert (tmp_path / "weights.bin").exists()
    bundle = imported(tmp_path / "model.onnx", cancer[::2], "diagnosis", tmp_path)
    (tmp_path / "weights.bin").unlink()
    assert Predictor.load(bundle, "fp32").predict(records(cancer[:3], "diagnosis"))[
        "label"
    ].shape == (3,)


class Marker:
    """Writes the number of its process to a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').write(str(__import__('os').getpid()))",)


def test_code_in_a_pickle_runs_only_if_allowed_and_elsewhere(cancer, tmp_path):
    path, marker = tmp_path / "model.pkl", tmp_path / "marker"
    path.write_bytes(pickle.dumps([Marker(marker), 1]))
    with pytest.raises(UserError, match=r"is a pickle.*give --allow-pickle\.$"):
        find_model_file(str(path), str(tmp_path), tmp_path, allow_pickle=False)
    assert not marker.exists()
    with pytest.raises(UserError, match=r"it holds a builtins\.list"):
        imported(path, cancer[::2], "diagnosis", tmp_path)
    assert int(marker.read_text()) != os.getpid()


class Call:
    """Runs a statement when it is unpickled."""

    def __init__(self, statement):
        self.statement = statement

    def __reduce__(self):
        return exec, (self.statement,)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux cuts the process off")
@pytest.mark.parametrize(
    "statement",
    [
        "__import__('socket').socket()",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "__import__('subprocess').run([__import__('sys').executable, '-c', "
        "'import socket; socket.socket()'], check=True)",
    ],
)
def test_a_pickle_has_no_network(statement, cancer, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Call(statement)))
    with pytest.raises(UserError, match=r"PermissionError|CalledProcessError"):
        imported(path, cancer[::2], "diagnosis", tmp_path)


def test_a_pickle_gets_no_environment(cancer, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Call("raise ValueError(sorted(__import__('os').environ))")))
    with pytest.raises(UserError, match="ValueError") as raised:
        imported(path, cancer[::2], "diagnosis", tmp_path)
    assert "AWS" not in str(raised.value)


def foreign(path):
    node = helper.make_node("Gelu2", ["scores"], ["more"], domain="my.ops")
    linear(path, nodes=[node], opsets=[helper.make_opsetid("my.ops", 1)])


def unknown(path):
    linear(path, nodes=[helper.make_node("NoSuchOperator", ["scores"], ["more"])])


def outside(path):
    saving = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    linear(path, saving=saving)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../weights.bin"
    path.write_bytes(model.SerializeToString())


def lost(path):
    saving = {"save_as_external_data": True, "location": "lost.bin", "size_threshold": 0}
    linear(path, saving=saving)
    path.with_name("lost.bin").unlink()


def without_inputs(path):
    nodes = [helper.make_node("Identity", ["weights"], ["probabilities"])]
    weights = numpy_helper.from_array(np.ones((2, 2), np.float32), "weights")
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph(nodes, "constant", [], [output], [weights])
    onnx.save(helper.make_model(graph), path)


BAD_FILES = [
    (foreign, r"operator Gelu2 of the domain 'my\.ops'"),
    (unknown, r"NoSuchOperator"),
    (outside, r"keeps weights in '\.\./weights\.bin', outside its folder"),
    (lost, r"keeps weights in 'lost\.bin', which is missing"),
    (without_inputs, r"has no inputs"),
    (lambda path: linear(path, batch=1), r"has a fixed batch of 1"),
    (lambda path: linear(path, width=7), r"it takes 7 columns, and the sample has 30"),
    (lambda path: path.write_bytes(b"no model"), r"is not an ONNX file"),
    (lambda path: path.write_bytes(b""), r"is not an ONNX file"),
]


@pytest.mark.parametrize(("write", "words"), BAD_FILES)
def test_a_bad_onnx_file_is_refused(write, words, cancer, tmp_path):
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    write(path)
    with pytest.raises(UserError, match=words) as raised:
        imported(path, cancer[::2], "diagnosis", tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def model_of(cancer, path):
    features, target, sample = split(cancer, "diagnosis")
    path.write_bytes(pickle.dumps(LogisticRegression(max_iter=5000).fit(features, target)))
    return sample


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.drop(columns=["mean area"]), "takes the column 'mean area', which the sample"),
        (lambda s: s.assign(**{"mean area": "large"}), "cannot be imported: "),
        (lambda s: s.assign(diagnosis="unclear"), "has only the value"),
        (
            lambda s: s.assign(diagnosis=s["diagnosis"].where(s.index > 9, "unclear")),
            "has the class 'unclear', which the model does not know",
        ),
        (lambda s: s.rename(columns={"diagnosis": "result"}), "has no column 'diagnosis'"),
    ],
    ids=["column", "text", "constant", "class", "target"],
)
def test_a_sample_that_does_not_fit_is_refused(change, words, cancer, tmp_path):
    sample = change(model_of(cancer, tmp_path / "model.pkl"))
    with pytest.raises(UserError, match=words) as raised:
        imported(tmp_path / "model.pkl", sample, "diagnosis", tmp_path)
    assert "\n" not in str(raised.value)


def test_classes_are_named_in_the_model_s_order(cancer, tmp_path):
    linear(tmp_path / "model.onnx")
    sample = cancer[::2]
    names = ("malignant", "benign")
    bundle = imported(tmp_path / "model.onnx", sample, "diagnosis", tmp_path, classes=names)
    assert bundle.task.target.classes == names
    with pytest.raises(UserError, match=r"has 2 classes, and 3 are known: a, b, c"):
        imported(tmp_path / "model.onnx", sample, "diagnosis", tmp_path, classes=["a", "b", "c"])


def test_a_missing_file_and_other_formats_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_model_file(str(tmp_path / "none.onnx"), str(tmp_path), tmp_path, allow_pickle=False)
    with pytest.raises(UserError, match=r"is a folder without MLmodel or config\.pbtxt"):
        find_model_file(str(tmp_path), str(tmp_path), tmp_path, allow_pickle=False)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="is of no known format; expected ONNX, pickle"):
        find_model_file(str(tmp_path / "notes.txt"), str(tmp_path), tmp_path, allow_pickle=False)
    (tmp_path / "MLmodel").write_text("flavors: {sklearn: {pickled_model: ../../x.pkl}}")
    with pytest.raises(UserError, match="names a file outside its folder"):
        find_model_file(str(tmp_path), str(tmp_path), tmp_path, allow_pickle=True)


def test_the_command_registers_a_model_that_is_served_offline(cancer, tmp_path):
    sample = model_of(cancer, tmp_path / "model.pkl")
    sample.to_csv(tmp_path / "sample.csv", index=False)
    command = [sys.executable, "-m", "train.bundle", "import", "model.pkl", "--allow-pickle"]
    command += ["--name", "cancer", "--data", "sample.csv", "--target", "diagnosis"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["uri"] == "models:/cancer@production"
    assert summary["metrics"]["test_accuracy"] > 0.9
    assert set(summary["variants"]) == {"fp32"}
    assert "it predicts as the original on 285 records" in done.stderr
    command = [sys.executable, "-m", "serve.offline", "--model", "models:/cancer@production"]
    command += ["--input", "sample.csv", "--output", "out.parquet"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    labels = pd.read_parquet(tmp_path / "out.parquet")["label"]
    with (tmp_path / "model.pkl").open("rb") as file:
        wanted = pickle.load(file).predict(sample.drop(columns=["diagnosis"]))
    assert labels.tolist() == wanted.tolist()


MODULE = """
import torch


class Scorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 64), torch.nn.ReLU()
        )
        self.head = torch.nn.Linear(64, {})

    def forward(self, x):
        return self.head(self.body(x))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of PyTorch with K outputs and its weights; return it."""
    monkeypatch.chdir(tmp_path)

    def write(outputs):
        (tmp_path / "scorers.py").write_text(MODULE.format(outputs))
        spec = importlib.util.spec_from_file_location("scorers", tmp_path / "scorers.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        torch.manual_seed(0)
        net = loaded.Scorer()
        net.train()(torch.randn(64, 30) * 100)
        safetensors.torch.save_file(net.state_dict(), tmp_path / "model.safetensors")
        return net.eval()

    return write


@pytest.mark.parametrize("outputs", [2, 1])
def test_a_module_of_pytorch(outputs, module, cancer, tmp_path):
    net, sample = module(outputs), cancer[::2]
    arguments = (tmp_path / "model.safetensors", sample, "diagnosis", tmp_path)
    bundle = imported(*arguments, class_path="scorers:Scorer")
    features = torch.from_numpy(sample.drop(columns=["diagnosis"]).to_numpy(np.float32))
    with torch.inference_mode():
        logits = net(features)
    wanted = torch.softmax(logits if outputs == 2 else torch.cat([0 * logits, logits], 1), 1)
    found = Predictor.load(bundle, "fp32").predict(records(sample, "diagnosis"))
    np.testing.assert_allclose(found["probabilities"], wanted.numpy(), rtol=0, atol=1e-4)
    assert bundle.manifest.imported.model == "scorers:Scorer"


def test_a_module_that_does_not_fit_is_refused(module, cancer, tmp_path):
    module(2)
    arguments = (tmp_path / "model.safetensors", cancer[::2], "diagnosis", tmp_path)
    with pytest.raises(UserError, match="weights in safetensors need --class-path"):
        imported(*arguments)
    with pytest.raises(UserError, match=r"'scorers:Other' cannot be constructed"):
        imported(*arguments, class_path="scorers:Other")
    narrow = (tmp_path / "model.safetensors", cancer[::2].drop(columns=["mean area"]))
    with pytest.raises(UserError, match="it does not take 29 columns"):
        imported(*narrow, "diagnosis", tmp_path, class_path="scorers:Scorer")
    (tmp_path / "scorers.py").write_text(MODULE.format(3))
    with pytest.raises(UserError, match=r"the weights do not fit 'scorers:Scorer'"):
        imported(*arguments, class_path="scorers:Scorer")


def test_columns_may_have_the_names_of_arrays(cancer, tmp_path):
    names = {"mean radius": "numbers", "mean texture": "logits", "mean area": "categories"}
    renamed = cancer.rename(columns=names)
    features, target, sample = split(renamed, "diagnosis")
    columns = ColumnTransformer([("all", StandardScaler(), list(features))])
    pipeline = make_pipeline(columns, LogisticRegression()).fit(features, target)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(pipeline))
    bundle = imported(tmp_path / "model.pkl", sample, "diagnosis", tmp_path)
    check_predictions(bundle, pipeline, sample, "diagnosis")
