"""Fields of requests: missing, unknown and nested ones; and named classes in responses."""

import numpy as np
import orjson
import pytest

from serve.errors import BadRequest
from serve.protocol import tensors, v1, v2
from train.bundle.manifest import TensorMetadata

NAMES = ("age", "user.city", "price")


@pytest.fixture(scope="module")
def manifest(bundle):
    inputs = [
        TensorMetadata(name="age", datatype="FP64", shape=[-1]),
        TensorMetadata(name="user.city", datatype="BYTES", shape=[-1]),
        TensorMetadata(name="price", datatype="FP64", shape=[-1]),
    ]
    return bundle.manifest.model_copy(update={"inputs": inputs, "nullable": ["age"]})


def decoded(manifest, *instances, **options):
    body = orjson.dumps({"instances": list(instances)})
    return v1.decode(body, manifest, 64, **options).columns


def test_a_missing_field_is_null_if_training_had_gaps_in_it(manifest):
    columns = decoded(
        manifest, {"user.city": "Rome", "price": 1}, {"user.city": "Oslo", "price": 2, "age": 3}
    )
    assert columns == {"age": [None, 3], "user.city": ["Rome", "Oslo"], "price": [1, 2]}
    with pytest.raises(BadRequest, match=r"instance 0 has no 'price'; .* expects age, user.city"):
        decoded(manifest, {"age": 1, "user.city": "Rome"})


def test_a_misspelt_field_does_not_count_as_missing(manifest):
    with pytest.raises(BadRequest, match="has no 'age', but has 'Age'"):
        decoded(manifest, {"Age": 5, "user.city": "Rome", "price": 1})


def test_unknown_fields_are_ignored_or_refused_as_configured(manifest):
    instance = {"age": 1, "user.city": "Rome", "price": 1, "row": 7}
    assert decoded(manifest, instance)["age"] == [1]
    with pytest.raises(BadRequest, match="instance 0 has the unknown field 'row'"):
        decoded(manifest, instance, unknown_fields="refuse")


def test_nested_objects_become_fields_with_a_dot(manifest):
    columns = decoded(manifest, {"age": 1, "user": {"city": "Rome"}, "price": 1})
    assert columns["user.city"] == ["Rome"]


def test_names_of_fields_are_normalised_as_in_training(bundle):
    inputs = [TensorMetadata(name="caf\u00e9", datatype="FP64", shape=[-1])]
    manifest = bundle.manifest.model_copy(update={"inputs": inputs, "nullable": ["caf\u00e9"]})
    for name in ("caf\u00e9", "cafe\u0301", " caf\u00e9 "):
        assert decoded(manifest, {name: 1}) == {"caf\u00e9": [1]}
        tensor = {"name": name, "datatype": "FP64", "shape": [1], "data": [1.0]}
        columns = v2.decode(orjson.dumps({"inputs": [tensor]}), None, manifest, 64).columns
        assert columns["caf\u00e9"] == [1]
    with pytest.raises(BadRequest, match="instance 0 has 'caf\u00e9' twice"):
        decoded(manifest, {"caf\u00e9": 1, "caf\u00e9 ": 2})
    assert decoded(manifest, {}, 2) == {"caf\u00e9": [None, 2]}


def test_a_misspelt_field_is_named_if_it_is_the_only_one(bundle):
    inputs = [TensorMetadata(name="age", datatype="FP64", shape=[-1])]
    manifest = bundle.manifest.model_copy(update={"inputs": inputs, "nullable": []})
    assert decoded(manifest, 3, {"age": 4}) == {"age": [3, 4]}
    with pytest.raises(BadRequest, match="has no 'age', but has 'Age'"):
        decoded(manifest, {"Age": 3})


def test_nested_data_must_have_its_declared_shape(manifest):
    def data(shape, values):
        tensor = {"name": "x", "datatype": "FP32", "shape": shape, "data": values}
        return tensors.decode(tensor, None)[1].tolist()

    assert data([2, 3], [[1, 2, 3], [4, 5, 6]]) == [[1, 2, 3], [4, 5, 6]]
    assert data([2, 3], [1, 2, 3, 4, 5, 6]) == [[1, 2, 3], [4, 5, 6]]
    assert data([2, 1], [1, 2]) == [[1], [2]]
    assert data([2], [[1], [2]]) == [1, 2]
    for values in ([[1, 2], [3, 4], [5, 6]], [[[1, 2]], [[3, 4]], [[5, 6]]]):
        with pytest.raises(BadRequest, match=r"its shape is \[2, 3\]"):
            data([2, 3], values)


def test_data_in_two_forms_is_refused():
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}
    with pytest.raises(BadRequest, match="both data and binary data"):
        tensors.decode(tensor, memoryview(bytes(4)))


def test_integers_of_any_length_keep_their_digits(manifest):
    body = b'{"instances": [{"age": 1, "user.city": 20000000000000000001, "price": 2}]}'
    assert v1.decode(body, manifest, 64).columns["user.city"] == [20_000_000_000_000_000_001]


@pytest.mark.parametrize(
    "start",
    [b"GIF89a", b"II+\0", b"data:image/png;base64,", b"\xff\xd8\xff\xe0", b"\0\0\0\x1cftypavif"],
)
def test_unsupported_image_files_are_not_read_as_pixels(bundle, start):
    """Even if their length is a multiple of a row's bytes."""
    body = start.ljust(5 * 64, b"x")
    (values,) = v2.decode(body, "0", bundle.manifest, 64).columns.values()
    assert values == [body]


def test_pixels_that_begin_like_a_bitmap_stay_pixels(bundle):
    (values,) = v2.decode(b"BM".ljust(5 * 64, b"\1"), "0", bundle.manifest, 64).columns.values()
    assert values.shape == (5, 8, 8, 1)


def test_tensors_follow_the_same_rules(manifest):
    def tensor(name, datatype, value):
        return {"name": name, "datatype": datatype, "shape": [1], "data": [value]}

    city, price = tensor("user.city", "BYTES", "Rome"), tensor("price", "FP64", 1.0)
    columns = v2.decode(orjson.dumps({"inputs": [city, price]}), None, manifest, 64).columns
    assert columns["age"] == [None]
    assert sorted(columns) == sorted(NAMES)
    more = orjson.dumps({"inputs": [city, price, tensor("row", "INT64", 7)]})
    assert "row" not in v2.decode(more, None, manifest, 64).columns
    with pytest.raises(BadRequest, match="the request has the unknown field 'row'"):
        v2.decode(more, None, manifest, 64, unknown_fields="refuse")
    with pytest.raises(BadRequest, match="the request has no 'price'"):
        v2.decode(orjson.dumps({"inputs": [city]}), None, manifest, 64)


def test_probabilities_have_class_names_on_request():
    predictions = {
        "label": np.array(["b"], object),
        "probabilities": np.array([[0.25, 0.75]], np.float32),
    }
    (named,) = orjson.loads(v1.encode(predictions, ("a", "b")))["predictions"]
    assert named == {"label": "b", "probabilities": {"a": 0.25, "b": 0.75}}
    (plain,) = orjson.loads(v1.encode(predictions))["predictions"]
    assert plain["probabilities"] == [0.25, 0.75]
