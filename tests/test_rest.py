"""HTTP, on the ASGI application with a real bundle behind it."""

import base64
import json

import numpy as np
import pytest
from starlette.testclient import TestClient

from serve.config import ServeConfig, validate
from serve.dataplane import DataPlane
from serve.protocol import rest
from tests.test_tasks import image_bytes
from train.bundle import Predictor
from train.config import validate as validate_run
from train.data import shards


@pytest.fixture(scope="module")
def client(bundle):
    plane = DataPlane(Predictor.load(bundle), "3", ServeConfig())
    with TestClient(rest.build(plane, ServeConfig(max_body_bytes=100_000))) as client:
        yield client


@pytest.fixture(scope="module")
def test_split(bundle):
    config = validate_run(bundle.manifest.config)
    inputs, targets = shards.prepare(config, config.storage.path).open("test")
    return inputs["image"], targets


def v2_body(images, name="image"):
    return {
        "inputs": [
            {
                "name": name,
                "shape": list(images.shape),
                "datatype": "UINT8",
                "data": images.ravel().tolist(),
            }
        ]
    }


def test_v1_png_and_v2_tensor_answer_what_the_predictor_says(client, bundle, test_split):
    images = test_split[0][:40]
    expected = Predictor.load(bundle).predict([{"image": image} for image in images])
    answer = client.post("/v2/models/digits/infer", json=v2_body(images)).json()
    label, probabilities = answer["outputs"]
    assert label["data"] == expected["label"].tolist()
    np.testing.assert_allclose(
        np.reshape(probabilities["data"], (40, 10)), expected["probabilities"], atol=1e-5
    )
    instances = [
        {"b64": base64.b64encode(image_bytes(image.squeeze())).decode()} for image in images
    ]
    answer = client.post("/v1/models/digits:predict", json={"instances": instances}).json()
    assert [row["label"] for row in answer["predictions"]] == label["data"]


def test_metadata_describes_the_model(client):
    answer = client.get("/v2/models/digits").json()
    assert answer["versions"] == ["3"]
    assert answer["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    assert client.get("/v2/models/digits/versions/3").json() == answer


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/health/live", 200),
        ("/v2/health/ready", 200),
        ("/v2", 200),
        ("/v2/models/digits/ready", 200),
        ("/v1/models/digits", 200),
        ("/docs", 200),
        ("/docs/assets/swagger-ui-bundle.js", 200),
        ("/v2/models/other", 404),
        ("/v2/models/..%2f..%2fetc", 404),
        ("/v2/models/digits/versions/4", 404),
        ("/v2/models/digits/infer", 405),
        ("/nowhere", 404),
        ("/docs/assets/../../secret", 404),
    ],
)
def test_each_path_answers_with_its_status(client, path, status):
    response = client.get(path)
    assert response.status_code == status
    if status >= 400:
        assert set(response.json()) == {"error"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/models/digits/infer", b"{", 400),
        ("/v2/models/other/infer", b"{}", 404),
        ("/v2/models/digits/versions/9/infer", b"{}", 404),
        ("/v1/models/digits:predict", b'{"instances": [{"b64": "AAAA"}]}', 400),
        ("/v1/models/other:predict", b"{}", 404),
        ("/v2/models/digits/infer", b" " * 100_001, 413),
    ],
)
def test_each_error_is_one_json_object(client, path, body, status):
    response = client.post(path, content=body)
    assert response.status_code == status
    assert set(response.json()) == {"error"}


def test_an_image_of_another_size_is_brought_to_size(client):
    large = np.zeros((1, 20, 30, 3), np.uint8)
    assert client.post("/v2/models/digits/infer", json=v2_body(large)).status_code == 200


def test_the_documented_examples_work_as_they_stand(client):
    paths = client.get("/openapi.json").json()["paths"]
    posts = {path: entry["post"] for path, entry in paths.items() if "post" in entry}
    assert len(posts) == 2
    for path, entry in posts.items():
        example = entry["requestBody"]["content"]["application/json"]["example"]
        assert client.post(path, content=json.dumps(example)).status_code == 200
    for path in set(paths) - set(posts):
        assert client.get(path).status_code == 200


def test_an_engine_failure_shows_no_insides(bundle):
    plane = DataPlane(Predictor.load(bundle), "1", ServeConfig())

    async def fail(records):
        raise RuntimeError("secret path")

    plane.infer = fail
    client = TestClient(rest.build(plane, ServeConfig()), raise_server_exceptions=False)
    response = client.post(
        "/v2/models/digits/infer", json=v2_body(np.zeros((1, 8, 8, 1)).astype(np.uint8))
    )
    assert response.status_code == 500
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"replica": "2"}, "replicas"), ({"replicas": "two"}, "two"), ({"threads": "0"}, "threads")],
)
def test_a_wrong_server_option_is_named(arguments, word):
    from cluster.errors import UserError

    with pytest.raises(UserError, match=word):
        validate(arguments)
