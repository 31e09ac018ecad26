"""Vectors and sets of labels as columns of the array of numbers."""

import json

import numpy as np
import pytest

from train.tasks import Features, InvalidRecord

KINDS = {"emb": {"kind": "vector"}, "tags": {"kind": "set"}, "x": {"kind": "number"}}
RECORDS = {
    "emb": [[1, 2.5], [3, 4], None, "[5, 6]"],
    "tags": [["a", "b"], [], None, "b;c"],
    "x": [1.0, 2.0, 3.0, 4.0],
}


@pytest.fixture
def fitted():
    return Features.of(KINDS).fit(RECORDS)


def raw(features, columns):
    (encoder,) = features.encoders
    scaled_NF = encoder.encode(columns)["numbers"]
    places_NF = scaled_NF * np.array(encoder.scale_F) + np.array(encoder.mean_F)
    return dict(zip(encoder.names, places_NF.T.round(3).tolist(), strict=True))


def test_each_vector_element_and_label_has_a_column(fitted):
    found = raw(fitted, RECORDS)
    assert list(found) == ["emb[0]", "emb[1]", "tags=b", "tags=a", "tags=c", "x"]
    np.testing.assert_array_equal(found["emb[1]"], [2.5, 4, np.nan, 6])
    np.testing.assert_array_equal(found["tags=b"], [1, 0, np.nan, 1])
    np.testing.assert_array_equal(found["tags=c"], [0, 0, np.nan, 1])
    assert [(spec.name, spec.datatype, spec.shape) for spec in fitted.fields] == [
        ("emb", "FP64", (2,)),
        ("tags", "BYTES", ()),
        ("x", "FP64", ()),
    ]


def test_arrays_and_lists_as_text_encode_the_same(fitted):
    tensors = {
        "emb": np.array([[1, 2.5], [3, 4]]),
        "tags": np.array([b"a|b", b'["c"]'], object),
        "x": np.array([1.0, 2.0]),
    }
    as_json = {"emb": [[1, 2.5], [3, 4]], "tags": [["b", "a"], ["c"]], "x": [1, 2]}
    assert raw(fitted, tensors) == raw(fitted, as_json)
    unseen = raw(fitted, {**as_json, "tags": [["new"], ["a", "new"]]})
    assert (unseen["tags=a"], unseen["tags=b"]) == ([0, 1], [0, 0])


def test_the_state_is_plain_json(fitted):
    again = Features.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2, 3], "has 3 numbers; expected 2"),
        ("soon", "expected a list of 2 numbers"),
        ([[1, 2]], "expected a list of 2 numbers"),
        ({"a": 1}, "expected a list of 2 numbers"),
    ],
)
def test_an_invalid_vector_is_refused_by_field_and_row(fitted, value, words):
    columns = {"emb": [[1, 2], value], "tags": [[], []], "x": [1, 2]}
    with pytest.raises(InvalidRecord, match=f"field 'emb' .*{words}") as caught:
        fitted.encode(columns)
    assert caught.value.row == 1
