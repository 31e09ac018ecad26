"""The HTTP routes of the ASGI application, with a real bundle."""

import base64
import gzip
import json
from hashlib import sha256

import numpy as np
import pytest
from starlette.websockets import WebSocketDisconnect

from serve.config import validate_options
from serve.http import gateway
from serve.security import APIKey, KeyStore
from tests.serving import client_of, make_rest
from tests.train.tasks.test_tasks import image_bytes
from train.bundle import Predictor
from train.config import validate_config as validate_run
from train.data import dataset


@pytest.fixture(scope="module")
def client(bundle):
    with client_of(make_rest(bundle, limits={"max_body_bytes": 100_000})) as client:
        yield client


@pytest.fixture(scope="module")
def test_split(bundle):
    config = validate_run(bundle.manifest.config)
    inputs, targets = dataset.prepare_dataset(config, config.storage.path).open("test")
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


def test_v1_png_and_v2_tensor_give_the_predictors_results(client, bundle, test_split):
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


def test_an_image_gives_the_same_result_in_every_form(client, test_split):
    """Send it as a typed body, in a form, as a data URI, compressed, and as another file type."""
    image = test_split[0][3].squeeze()
    png, tiff = image_bytes(image), image_bytes(image, "TIFF")
    infer, predict = "/v2/models/digits/infer", "/v1/models/digits:predict"
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    as_uri = json.dumps({"instances": [{"image": uri}]}).encode()
    typed = {"Content-Type": "image/png"}
    (answer,) = client.post(predict, content=as_uri).json()["predictions"]
    same = [
        client.post(predict, content=png, headers=typed),
        client.post(predict, content=tiff, headers={"Content-Type": "image/tiff"}),
        client.post(predict, files={"photo": ("a.png", png, "image/png")}),
        client.post(predict, content=gzip.compress(as_uri), headers={"Content-Encoding": "gzip"}),
    ]
    assert [each.json() for each in same] == [{"predictions": [answer]}] * 4
    tensors = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [uri]}
    for response in (
        client.post(infer, content=png, headers=typed),
        client.post(infer, files={"image": ("a.tif", tiff, "image/tiff")}),
        client.post(infer, json={"inputs": [tensors]}),
    ):
        label, probabilities = response.json()["outputs"]
        assert label["data"] == [answer["label"]]
        np.testing.assert_allclose(probabilities["data"], answer["probabilities"], rtol=1e-6)
    named = {"instances": [uri], "parameters": {"named": True}}
    (with_names,) = client.post(predict, json=named).json()["predictions"]
    assert list(with_names["probabilities"]) == [str(digit) for digit in range(10)]
    assert list(with_names["probabilities"].values()) == answer["probabilities"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Encoding": "gzip"}, 400),
        ({"Content-Type": "multipart/form-data; boundary=b"}, 400),
    ],
)
def test_invalid_and_unsupported_bodies_are_refused(client, headers, status):
    for path in ("/v2/models/digits/infer", "/v1/models/digits:predict"):
        response = client.post(path, content=b'{"instances": []}', headers=headers)
        assert response.status_code == status
        assert response.json()["error"]


def test_metadata_describes_the_model(client):
    answer = client.get("/v2/models/digits").json()
    assert answer["versions"] == ["3"]
    assert answer["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    for version in ("3", "production"):
        assert client.get(f"/v2/models/digits/versions/{version}").json() == answer


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
        ("/v2/models", 200),
        ("/v2/models/digits/config", 200),
        ("/v2/models/digits/stats", 200),
        ("/metrics", 200),
        ("/v2/repository/index", 405),
        ("/nowhere", 404),
        ("/docs/assets/../../secret", 404),
        ("/docs/assets/index.html", 404),
    ],
)
def test_each_path_has_its_status(client, path, status):
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
        ("/v2/models/digits/infer", b"[" * 10_000, 400),
        ("/v2/repository/models/other/load", b"", 404),
        ("/v2/repository/models/..%2fdigits/load", b"", 404),
    ],
)
def test_each_error_is_one_json_object(client, path, body, status):
    response = client.post(path, content=body)
    assert response.status_code == status
    assert set(response.json()) == {"error"}


def test_an_image_of_another_size_is_resized(client):
    large = np.zeros((1, 20, 30, 3), np.uint8)
    assert client.post("/v2/models/digits/infer", json=v2_body(large)).status_code == 200


def test_the_documented_examples_work(client):
    paths = client.get("/openapi.json").json()["paths"]
    posts = {path: entry["post"] for path, entry in paths.items() if "post" in entry}
    # Feedback needs the ID of an earlier request.
    others = {path: entry for path, entry in posts.items() if not path.endswith("/feedback")}
    bodies = {path: entry.get("requestBody") for path, entry in others.items()}
    # Two for predictions and one for loading.
    assert sum(body is not None for body in bodies.values()) == 3
    for path, body in bodies.items():
        if body is not None:
            example = body["content"]["application/json"]["example"]
            assert client.post(path, content=json.dumps(example)).status_code == 200
    for path in set(paths) - set(posts):
        assert client.get(path).status_code == 200


def test_an_engine_failure_reveals_no_details(bundle, caplog):
    rest = make_rest(bundle)

    def fail(inputs):
        raise RuntimeError("secret path")

    plane = rest._handler.endpoint("digits").plane
    plane.batcher._run = fail
    response = client_of(rest).post("/v2/models/digits/infer", json=v2_body(ZEROS))
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret path" in caplog.text


ZEROS = np.zeros((1, 8, 8, 1), np.uint8)


def test_a_body_can_be_raw_pixels_or_an_image_file(client, test_split):
    images = test_split[0][:3]
    expected = client.post("/v2/models/digits/infer", json=v2_body(images)).json()["outputs"]
    raw = {"Inference-Header-Content-Length": "0"}
    answer = client.post("/v2/models/digits/infer", content=images.tobytes(), headers=raw)
    assert answer.json()["outputs"] == expected
    png = image_bytes(images[0].squeeze())
    answer = client.post("/v2/models/digits/infer", content=png, headers=raw)
    assert answer.json()["outputs"][0]["data"] == expected[0]["data"][:1]
    for wrong in (b"", b"x" * 63, b"x" * 64 * 2000):
        response = client.post("/v2/models/digits/infer", content=wrong, headers=raw)
        assert response.status_code in (400, 413)


@pytest.mark.parametrize(
    ("options", "body", "status"),
    [
        ({"limits": {"max_json_bytes": 1000}}, v2_body(np.zeros((10, 8, 8, 1), np.uint8)), 413),
        ({"limits": {"max_rows": 2}}, v2_body(np.zeros((3, 8, 8, 1), np.uint8)), 413),
        ({"limits": {"max_pixels": 100}}, {"instances": [{"b64": "PNG"}] * 2}, 413),
        (
            {},
            {"inputs": [{**v2_body(np.zeros((1, 8, 8, 1)))["inputs"][0], "shape": [0, 2**31 - 1]}]},
            400,
        ),
    ],
)
def test_requests_beyond_a_limit_are_refused(bundle, options, body, status):
    with client_of(make_rest(bundle, **options)) as client:
        png = base64.b64encode(image_bytes(np.zeros((8, 8), np.uint8))).decode()
        path = "/v1/models/digits:predict" if "instances" in body else "/v2/models/digits/infer"
        response = client.post(path, content=json.dumps(body).replace("PNG", png))
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}


def test_websockets_are_refused(bundle):
    rest = make_rest(bundle)
    gateway.register_app(rest)
    try:
        client = client_of(gateway.Gateway(rest))
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v2"):
            pass
        assert client.get("/v2").status_code == 200
    finally:
        gateway.register_app(None)


def test_every_response_has_the_id_of_its_request(client):
    given = client.get("/v2", headers={"X-Request-ID": "mine"})
    assert given.headers["x-request-id"] == "mine"
    made = {client.get("/nowhere").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


def test_a_request_can_set_its_timeout_and_priority(client):
    body = {**v2_body(ZEROS), "parameters": {"timeout": 1}}
    response = client.post("/v2/models/digits/infer", json=body)
    assert response.status_code in (503, 504)
    assert int(response.headers["Retry-After"]) >= 1
    body["parameters"] = {"timeout": 20_000_000, "priority": 1}
    assert client.post("/v2/models/digits/infer", json=body).status_code == 200
    body["parameters"] = {"priority": 9}
    assert client.post("/v2/models/digits/infer", json=body).status_code == 400


def test_an_unloaded_model_is_listed_as_unavailable(bundle):
    with client_of(make_rest(bundle)) as client:
        assert client.post("/v2/repository/index").json()[0]["state"] == "READY"
        assert client.post("/v2/repository/models/digits/unload").status_code == 200
        assert client.post("/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"


def test_keys_give_access_to_their_models_only(bundle):
    both, other = "hk_" + "a" * 43, "hk_" + "b" * 43
    keys = KeyStore(
        [
            APIKey(name="both", sha256=sha256(both.encode()).hexdigest(), admin=True),
            APIKey(name="other", sha256=sha256(other.encode()).hexdigest(), models=["x"], rate=2),
        ]
    )
    with client_of(make_rest(bundle, keys=keys, security={"metrics_without_key": True})) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v2/models/digits").status_code == 401
    with client_of(make_rest(bundle, keys=keys)) as client:

        def status(path, key=None, method="GET"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return client.request(method, path, headers=headers).status_code

        assert status("/v2/health/ready") == 200
        assert status("/docs") == 200
        assert status("/metrics") == 401
        assert status("/v2/models/digits/versions/docs") == 401
        assert status("/v2/models/digits") == 401
        assert status("/v2/models/digits", "hk_" + "c" * 43) == 401
        assert status("/v2/models/digits", both) == 200
        assert status("/v2/models/digits", other) == 403
        assert status("/v2/repository/models/digits/load", both, "POST") == 200
        assert status("/v2/repository/models/digits/load", other, "POST") == 403
        assert status("/v2/models/digits", other) == 429


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"replica": "2"}, "replicas"),
        ({"replicas": "two"}, "two"),
        ({"replicas": "3-2"}, "MIN less than MAX"),
        ({"threads": "0"}, "threads"),
        ({"security.tls_cert": "a"}, "must be given together"),
        ({"security.tls_client_ca": "a"}, "needs security.tls_cert"),
        ({"model": "/some/path", "extra_versions": "2"}, "registered model"),
        ({"limits": "1024"}, "limits.OPTION=VALUE"),
        ({"limits.rows": "1"}, "limits.max_rows"),
    ],
)
def test_a_wrong_server_option_is_named(arguments, word):
    from cluster.errors import UserError

    with pytest.raises(UserError, match=word):
        validate_options(arguments)


def test_behind_rays_proxy_no_request_id_is_added(bundle):
    with client_of(gateway.ProxyConnection(make_rest(bundle))) as proxied:
        answer = proxied.get("/v2", headers={"X-Request-ID": "r1"})
    assert answer.json()["name"] == "halyard"
    assert "x-request-id" not in answer.headers


@pytest.mark.parametrize("parameter", ["timeout", "priority", "named", "binary_data_output"])
def test_deeply_nested_parameters_are_refused(client, parameter):
    # Close to the deepest JSON that is parsed; Python cannot print it.
    nested = json.loads("[" * 900 + "]" * 900)
    for path, body in (
        ("/v2/models/digits/infer", v2_body(ZEROS)),
        ("/v1/models/digits:predict", {"instances": [ZEROS[0].tolist()]}),
    ):
        response = client.post(path, json={**body, "parameters": {parameter: nested}})
        assert response.status_code in (200, 400)
        assert response.status_code == 400 or parameter in ("named", "binary_data_output")
