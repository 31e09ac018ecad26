"""The edge file, in a process with onnxruntime and numpy only, against the predictor."""

import numpy as np
import onnx
import pytest
import torch

from tests.alone import edge_labels, run_alone
from tests.train.tasks.test_columns import fitted
from tests.train.tasks.test_tasks import image_bytes
from train import nets
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress import edge_readme, export_edge
from train.compress.recipes import export_onnx
from train.config import Net
from train.data.dataset import EncodedDataset
from train.tasks import Images, Task


def test_the_edge_file_predicts_the_labels_of_the_bundle(bundle, trained, tmp_path):
    from tests.train.bundle.test_bundle import shards_of
    from train.bundle import Predictor

    export_edge.export_edge(bundle, None, tmp_path)
    images = np.array(EncodedDataset(*shards_of(bundle, trained)).open("test")[0]["image"])
    labels = edge_labels(tmp_path, "image", images)
    assert labels == Predictor.load(bundle).run({"image": images})["label"].tolist()


def test_the_code_in_the_edge_readme_runs(bundle, tmp_path, rng):
    export_edge.export_edge(bundle, None, tmp_path)
    (tmp_path / "image.png").write_bytes(image_bytes(rng.integers(0, 256, (9, 9), np.uint8)))
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 15
    assert "probabilities" in code
    assert "0." in run_alone(code, tmp_path)


def test_the_edge_readme_shows_how_to_resize_to_a_free_height(rng, tmp_path):
    encoder = Images("picture", (None, 8), 3)
    pixels = rng.integers(0, 256, (40, 16, 3), np.uint8)
    (tmp_path / "image.png").write_bytes(image_bytes(pixels))
    script = edge_readme._Script()
    script.add(encoder)
    code = "\n".join([*script._imports, *script._before, "np.save('pixels.npy', pixels)"])
    run_alone(code, tmp_path)
    expected = encoder.encode({"picture": [(tmp_path / "image.png").read_bytes()]})["picture"]
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), expected)


@pytest.mark.parametrize(
    ("classes", "changes"),
    [
        ("pq", {}),
        ("pq", {"temperature": 1.7}),
        ("pq", {"thresholds": (0.45,)}),
        ("qp", {"thresholds": (0.55,), "temperature": 0.6}),
        ("pq", {"costs": ((0.0, 1.0), (1.2, 0.0))}),
        ("pqr", {"costs": ((0.0, 1.0, 1.0), (1.3, 0.0, 1.0), (0.8, 1.0, 0.0))}),
    ],
)
def test_the_edge_file_of_a_table_model_matches_the_task(rng, tmp_path, classes, changes):
    kinds = {"n": "number", "b": "boolean", "c": "category", "d": "date", "e": "date"}
    kinds |= {"v": "vector", "s": "set", "m": "number"}
    moments = np.array(["2024-02-29T13:45:10", "2021-07-01T00:00:00", "NaT"], "datetime64[s]")
    records = {
        "n": [1e9 + 1, -2.5, None, 3.0, float("inf"), 0.0],
        "b": [True, False, None, True, False, True],
        "c": ["x", "y", None, "x", "never seen", "x"],
        "d": [str(m) if not np.isnat(m) else None for m in np.resize(moments, 6)],
        "e": [str(m) if not np.isnat(m) else None for m in np.resize(moments[::-1], 6)],
        "v": [[1, 2], [3, 4.5], None, [5, 6], [7, 8], [-1, 0]],
        "s": [["k"], ["l", "k"], [], ["l"], ["never seen"], None],
        "m": [1, -999, 2, -999, 3, 1e300],
    }
    seen = {name: values[:4] + values[5:] for name, values in records.items()}
    columns = {name: {"kind": kind} for name, kind in kinds.items()}
    columns["m"]["missing"] = (-999.0,)
    task = Task.of(columns, "y", "classification")
    # The first class has one record more than the second.
    values = [*(classes * 2)[: 5 - len(classes) % 2], classes[0]][:5]
    task = fitted(task, seen, values).with_target(**changes)
    arrays = task.features.encode(records)
    torch.manual_seed(0)
    net = nets.create_net(Net(hidden=[16], members=3), task)
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    net.fit_inputs(*tensors)
    # So that the predicted classes differ between records.
    net.head.weight.data *= 30
    net.head.bias.data -= net.eval()(*tensors).mean(dim=0)
    path = tmp_path / "net.onnx"
    export_onnx.to_onnx(nets.folded_net(net), task.features.inputs, arrays, path)
    expected = task.target.decode(OnnxRuntimeEngine.load(path, num_threads=1).run(arrays))
    model = onnx.load(path)
    export_edge.embed_processing(model, task)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "edge.onnx")
    seconds = {
        name: np.array(
            [
                np.nan if value is None else np.datetime64(value, "s").astype(int)
                for value in records[name]
            ]
        )
        for name in ("d", "e")
    }
    given = {
        "n": np.array([np.nan if value is None else value for value in records["n"]]),
        "b": np.array([np.nan if value is None else float(value) for value in records["b"]]),
        "c": np.array([value or "" for value in records["c"]], object),
        "v": np.array([[np.nan] * 2 if value is None else value for value in records["v"]]),
        "s": np.array(
            [
                [np.nan] * 2 if value is None else [float(label in value) for label in "kl"]
                for value in records["s"]
            ]
        ),
        "m": np.array(records["m"], np.float64),
        **seconds,
    }
    result = OnnxRuntimeEngine.load(tmp_path / "edge.onnx", num_threads=1).run(given)
    assert result["label"].tolist() == expected["label"].tolist()
    assert len(set(expected["label"])) > 1
    np.testing.assert_allclose(result["probabilities"], expected["probabilities"], atol=1e-5)
