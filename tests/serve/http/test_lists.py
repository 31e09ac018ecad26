"""Vectors and sets of labels in requests give a trained net's predictions in every format."""

import json

import numpy as np
import pandas as pd
import pytest

from serve import Client
from tests.serving import client_of, listening, make_rest
from train.bundle import Predictor
from train.config import validate_config
from train.data.schema import inference
from train.training import train_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INFER, PREDICT = "/v2/models/songs/infer", "/v1/models/songs:predict"


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 3)).round(3)
    tags = [
        sorted(rng.choice(["calm", "loud", "old"], rng.integers(0, 3), replace=False).tolist())
        for _ in vectors
    ]
    hits = [
        bool(vector[0] + ("loud" in tag) > 0.3) for vector, tag in zip(vectors, tags, strict=True)
    ]
    return [
        {"sound": vector.tolist(), "tags": tag, "hit": "yes" if hit else "no"}
        for vector, tag, hit in zip(vectors, tags, hits, strict=True)
    ]


@pytest.fixture(scope="module")
def bundle(records, ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("songs")
    path = folder / "songs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    options = {
        "name": "songs",
        "target": "hit",
        "data": {"train": str(path)},
        "workers": {"num": 1},
        "optim": {"name": "adamw", "lr": 0.01, "epochs": 10, "batch_size": 64},
        "storage": {"path": str(folder / "runs")},
    }
    return train_bundle(inference.complete_config(validate_config(options)))


@pytest.fixture(scope="module")
def client(bundle):
    with client_of(make_rest(bundle)) as client:
        yield client


def test_the_metadata_gives_the_length_of_vectors(client):
    inputs = client.get("/v2/models/songs").json()["inputs"]
    assert inputs == [
        {"name": "sound", "datatype": "FP64", "shape": [-1, 3]},
        {"name": "tags", "datatype": "BYTES", "shape": [-1]},
    ]


def test_lists_give_the_same_predictions_in_every_format(client, bundle, records):
    asked = [{name: each[name] for name in ("sound", "tags")} for each in records[:20]]
    expected = Predictor.load(bundle).predict(asked)
    hits = [each["hit"] for each in records[:20]]
    assert np.mean([label == hit for label, hit in zip(expected["label"], hits, strict=True)]) > 0.8

    def check(probabilities):
        np.testing.assert_allclose(
            np.reshape(probabilities, (20, 2)), expected["probabilities"], atol=1e-6
        )

    for written in (list, json.dumps, lambda tags: "|".join(tags) or "[]"):
        instances = [{**each, "tags": written(each["tags"])} for each in asked]
        answer = client.post(PREDICT, json={"instances": instances}).json()
        check([row["probabilities"] for row in answer["predictions"]])
    sound_NF = np.array([each["sound"] for each in asked])
    texts = [json.dumps(each["tags"]) for each in asked]
    tensors = [
        {"name": "sound", "shape": [20, 3], "datatype": "FP64", "data": sound_NF.tolist()},
        {"name": "tags", "shape": [20], "datatype": "BYTES", "data": texts},
    ]
    check(client.post(INFER, json={"inputs": tensors}).json()["outputs"][1]["data"])
    tensors[0]["data"] = sound_NF.ravel().tolist()
    check(client.post(INFER, json={"inputs": tensors}).json()["outputs"][1]["data"])
    raw = [sound_NF.tobytes(), binary_texts(texts)]
    for tensor, data in zip(tensors, raw, strict=True):
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": tensors}).encode()
    answer = client.post(
        INFER,
        content=head + b"".join(raw),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    check(answer.json()["outputs"][1]["data"])


def binary_texts(texts):
    """Return the texts in v2's binary format: each after its length in four bytes."""
    return b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in texts)


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"sound": [1, 2], "tags": []}, "sound"),
        ({"sound": [1, 2, "x"], "tags": []}, "sound"),
        ({"sound": 5, "tags": []}, "sound"),
        ({"sound": [1, 2, 3], "tags": {"calm": 1}}, "tags"),
        ({"sound": [1, 2, 3], "tags": [["calm"]]}, "tags"),
    ],
)
def test_invalid_vectors_and_sets_are_refused(client, record, word):
    response = client.post(PREDICT, json={"instances": [record]})
    assert response.status_code == 400
    assert word in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_a_vector_of_another_length_is_refused(client):
    tensors = [
        {"name": "sound", "shape": [2, 2], "datatype": "FP64", "data": [1, 2, 3, 4]},
        {"name": "tags", "shape": [2], "datatype": "BYTES", "data": ["calm", "[]"]},
    ]
    response = client.post(INFER, json={"inputs": tensors})
    assert response.status_code == 400
    assert "sound" in response.json()["error"]


def test_the_client_sends_lists_in_every_form(bundle, records):
    asked = [{name: each[name] for name in ("sound", "tags")} for each in records[:20]]
    expected = Predictor.load(bundle).predict(asked)["probabilities"]
    classes = [f"probabilities.{name}" for name in bundle.task.target.classes]
    with listening(make_rest(bundle)) as url, Client(url, batch_rows=7) as client:
        frame = client.predict(pd.DataFrame(asked))
        np.testing.assert_allclose(frame[classes], expected, atol=1e-6)
        columns = {
            "sound": np.array([each["sound"] for each in asked]),
            "tags": [each["tags"] for each in asked],
        }
        found = client.predict(columns)
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
        found = client.predict({**columns, "tags": [set(each["tags"]) for each in asked]})
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
