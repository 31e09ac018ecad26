"""Inputs of a free length: padded tensors with the lengths of their rows."""

import json
import sys

import numpy as np
import orjson
import pytest

from serve.errors import BadRequest
from serve.protocol import v2
from train.bundle.manifest import TensorMetadata
from train.tasks import TensorSpec
from train.values.ragged import FREE


@pytest.fixture
def manifest(bundle):
    walk = TensorMetadata.of(TensorSpec("walk", "INT64", (FREE, 2)))
    size = TensorMetadata.of(TensorSpec("size", "FP64", ()))
    assert walk.shape == [-1, -1, 2]
    return bundle.manifest.model_copy(update={"inputs": [walk, size], "nullable": ["size"]})


WALKS = np.arange(1, 13, dtype=np.int64).reshape(2, 3, 2)


def body(**changes):
    walk = {
        "name": "walk",
        "shape": [2, 3, 2],
        "datatype": "INT64",
        "data": WALKS.ravel().tolist(),
        **changes,
    }
    return orjson.dumps({"inputs": [walk]})


def test_rows_without_lengths_all_have_the_length_of_the_tensor(manifest):
    columns = v2.decode(body(), None, manifest, 64).columns
    np.testing.assert_array_equal(columns["walk"], WALKS)


def test_rows_are_cut_to_their_lengths(manifest):
    columns = v2.decode(body(parameters={"lengths": [1, 3]}), None, manifest, 64).columns
    assert [row.tolist() for row in columns["walk"]] == [WALKS[0, :1].tolist(), WALKS[1].tolist()]
    columns = v2.decode(body(parameters={"lengths": [2, 2]}), None, manifest, 64).columns
    assert [row.shape for row in columns["walk"]] == [(2, 2), (2, 2)]
    columns = v2.decode(body(parameters={"lengths": [0, 0]}), None, manifest, 64).columns
    assert [len(row) for row in columns["walk"]] == [0, 0]


@pytest.mark.parametrize(
    "lengths", [[1], [1, 2, 3], [1, 4], [1, -1], [1, 2.0], [True, 1], 3, {}, "1,x", "1", [[1], [2]]]
)
def test_lengths_that_disagree_with_the_data_are_refused(manifest, lengths):
    with pytest.raises(BadRequest, match=r"input 'walk'.*expected 2 integers from 0 to 3"):
        v2.decode(body(parameters={"lengths": lengths}), None, manifest, 64)


def test_ragged_rows_without_their_lengths_are_refused(manifest):
    data = [[[1, 2]], [[3, 4], [5, 6], [7, 8]]]
    with pytest.raises(BadRequest, match=r"ragged; .* pad them and send parameter 'lengths'"):
        v2.decode(body(data=data), None, manifest, 64)


def test_lengths_of_an_input_of_fixed_shape_are_refused(bundle):
    image = {
        "name": "image",
        "shape": [1, 8, 8, 1],
        "datatype": "UINT8",
        "data": [0] * 64,
        "parameters": {"lengths": [8]},
    }
    with pytest.raises(BadRequest, match=r"length of its rows is not free\. Omit it"):
        v2.decode(json.dumps({"inputs": [image]}).encode(), None, bundle.manifest, 64)


def test_a_body_without_json_is_one_record(manifest):
    alone = manifest.model_copy(update={"inputs": manifest.inputs[:1]})
    columns = v2.decode(WALKS.tobytes(), "0", alone, 64).columns
    assert sys.byteorder == "little"
    np.testing.assert_array_equal(columns["walk"], WALKS.reshape(1, 6, 2))
    with pytest.raises(BadRequest, match="multiple of 16"):
        v2.decode(WALKS.tobytes()[:-8], "0", alone, 64)
