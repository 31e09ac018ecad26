"""The codecs of v1 and v2: JSON and binary agree, and malformed requests raise BadRequest."""

import io
import json
import struct
import tracemalloc

import numpy as np
import orjson
import pytest
from PIL import Image

from serve.errors import BadRequest, PayloadTooLarge
from serve.protocol import tensors, v1, v2
from train.bundle.manifest import Manifest, TensorMetadata

PIXELS = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)


@pytest.fixture
def manifest(bundle):
    return bundle.manifest


def tensor(**changes):
    return {
        "name": "image",
        "shape": [1, 8, 8, 1],
        "datatype": "UINT8",
        "data": PIXELS.ravel().tolist(),
        **changes,
    }


def as_json(**changes):
    return orjson.dumps({"inputs": [tensor(**changes)]})


def as_binary(raw, **changes):
    entry = tensor(parameters={"binary_data_size": len(raw)}, **changes)
    del entry["data"]
    head = json.dumps({"inputs": [entry]}).encode()
    return head + raw, str(len(head))


def test_json_flat_nested_and_binary_give_the_same_record(manifest):
    flat = v2.decode(as_json(), None, manifest, 64)
    nested = v2.decode(as_json(data=PIXELS.tolist()), None, manifest, 64)
    binary = v2.decode(*as_binary(PIXELS.tobytes()), manifest, 64)
    for request in (flat, nested, binary):
        record = {name: values[0] for name, values in request.columns.items()}
        assert record["image"].dtype == np.uint8
        np.testing.assert_array_equal(record["image"], PIXELS[0])


def test_bytes_elements_can_be_binary_base64_or_text(manifest):
    raw = struct.pack("<I", 3) + b"abc"
    requests = [
        v2.decode(*as_binary(raw, shape=[1], datatype="BYTES"), manifest, 64),
        v2.decode(
            as_json(
                shape=[1],
                datatype="BYTES",
                data=["YWJj"],
                parameters={"content_type": "base64"},
            ),
            None,
            manifest,
            64,
        ),
        v2.decode(as_json(shape=[1], datatype="BYTES", data=["abc"]), None, manifest, 64),
    ]
    for request in requests:
        assert request.columns == {"image": [b"abc"]}


@pytest.mark.parametrize("datatype", ["UINT8", "INT16", "UINT64", "FP32", "FP64", "BOOL"])
def test_numbers_survive_both_forms(datatype):
    dtype = tensors.DTYPES[datatype]
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    entry, raw = tensors.encode_raw("x", values)
    for given, data in (
        ({**entry}, memoryview(raw)),
        (
            orjson.loads(
                orjson.dumps(tensors.encode_json("x", values), option=orjson.OPT_SERIALIZE_NUMPY)
            ),
            None,
        ),
    ):
        name, decoded = tensors.decode(given, data)
        assert name == "x"
        assert decoded.dtype == dtype
        np.testing.assert_array_equal(decoded, values)


MALFORMED = {
    "no JSON": (b"{", None),
    "no object": (b"[]", None),
    "no inputs": (b"{}", None),
    "empty inputs": (b'{"inputs": []}', None),
    "input is no object": (b'{"inputs": [1]}', None),
    "unknown datatype": (as_json(datatype="INT7"), None),
    "wrong name": (as_json(name="picture"), None),
    "negative shape": (as_json(shape=[-1, 8, 8, 1]), None),
    "shape of strings": (as_json(shape=["1"]), None),
    "shape too deep": (as_json(shape=[1] * 9), None),
    "empty shape": (as_json(shape=[]), None),
    "shape × datatype overflow": (as_json(shape=[2**62, 2**62]), None),
    "shape does not match data": (as_json(shape=[1, 8, 8, 2]), None),
    "no rows": (as_json(shape=[0, 8, 8, 1], data=[]), None),
    "ragged data": (as_json(data=[[1], [1, 2]]), None),
    "out of range": (as_json(data=[256] * 64), None),
    "fractions for integers": (as_json(data=[0.5] * 64), None),
    "strings for integers": (as_json(data=["1"] * 64), None),
    "null": (as_json(data=[None] * 64), None),
    "not base64": (
        as_json(shape=[1], datatype="BYTES", data=["?"], parameters={"content_type": "base64"}),
        None,
    ),
    "parameters are no object": (as_json(parameters=[1]), None),
    "id is no string": (orjson.dumps({"id": 1, "inputs": [tensor()]}), None),
    "unknown output": (orjson.dumps({"inputs": [tensor()], "outputs": [{"name": "x"}]}), None),
    "outputs are no list": (orjson.dumps({"inputs": [tensor()], "outputs": {}}), None),
    "header longer than the body": (as_json(), "100000"),
    "header is no number": (as_json(), "-1"),
    "binary too short": as_binary(PIXELS.tobytes()[:-1]),
    "binary too long for its shape": as_binary(PIXELS.tobytes() + b"x"),
    "bytes cut off": as_binary(struct.pack("<I", 9) + b"abc", shape=[1], datatype="BYTES"),
    "bytes left over": as_binary(struct.pack("<I", 0) * 2, shape=[1], datatype="BYTES"),
    "a size beyond all": (as_json(shape=[0, 2**63], data=[]), None),
    "one long string among short ones": (as_json(data=["x" * 100_000] + ["a"] * 63), None),
    "a header of thousands of digits": (as_json(), "1" * 5000),
    "nested deeper than any tensor": (
        b'{"inputs":[{"name":"image","shape":[1],"datatype":"UINT8","data":'
        + b"[" * 20
        + b"1"
        + b"]" * 20
        + b"}]}",
        None,
    ),
    "one image without its batch": (as_json(shape=[8, 8, 1]), None),
    "one image without its batch, binary": as_binary(PIXELS.tobytes(), shape=[8, 8, 1]),
    "pixels in one row": (as_json(shape=[1, 64]), None),
    "more dimensions than the model's": (as_json(shape=[1, 1, 8, 8, 1]), None),
    "files of two dimensions": (as_json(shape=[1, 2], datatype="BYTES", data=["a", "b"]), None),
    "classification of an output": (
        orjson.dumps(
            {
                "inputs": [tensor()],
                "outputs": [{"name": "label", "parameters": {"classification": 3}}],
            }
        ),
        None,
    ),
    "shared memory": (as_json(parameters={"shared_memory_region": "r"}), None),
    "a string for a boolean": (
        orjson.dumps({"inputs": [tensor()], "parameters": {"binary_data_output": "false"}}),
        None,
    ),
    "a number for an output's boolean": (
        orjson.dumps(
            {
                "inputs": [tensor()],
                "outputs": [{"name": "label", "parameters": {"binary_data": 0}}],
            }
        ),
        None,
    ),
    "too deeply nested": (b'{"inputs":' + b"[" * 100_000, None),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_in_one_line(case, manifest):
    with pytest.raises(BadRequest) as caught:
        v2.decode(*MALFORMED[case], manifest, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[1e39, 0.0], [-3.5e38, 0.0], [10**39, 0]])
def test_numbers_that_fp32_cannot_hold_are_refused(values):
    entry = {"name": "x", "datatype": "FP32", "shape": [2], "data": values}
    with pytest.raises(BadRequest, match=r"input 'x': data ranges from .*; FP32 cannot hold it"):
        tensors.decode(entry, None)
    tensors.decode({**entry, "datatype": "FP64"}, None)


@pytest.mark.parametrize("is_image", [False, True])
def test_an_image_file_as_body_is_not_read_as_pixels(manifest, is_image):
    """Even if its length is that of whole images, which holds for one file in 64."""
    file = io.BytesIO()
    Image.fromarray(PIXELS[0, :, :, 0]).save(file, "PNG")
    # Decoders ignore bytes after the end of a PNG file.
    content = file.getvalue() + b"\0" * (-len(file.getvalue()) % 64)
    request = v2.decode(content, "0", manifest, 64, is_image=is_image)
    assert request.columns == {"image": [content]}


def test_pixels_as_body_are_images_unless_their_type_differs(manifest):
    begins_as_jpeg = b"\xff\xd8\xff\x10" + PIXELS.tobytes()[4:]
    for body in (PIXELS.tobytes() * 2, begins_as_jpeg):
        columns = v2.decode(body, "0", manifest, 64).columns
        assert columns["image"].tobytes() == body
    with_type = v2.decode(PIXELS.tobytes(), None, manifest, 64, is_image=True)
    assert with_type.columns == {"image": [PIXELS.tobytes()]}


def test_v1_lists_must_have_the_shape_of_the_model(manifest):
    grey = PIXELS[0, :, :, 0].tolist()
    for instance in (PIXELS[0].tolist(), grey):
        body = orjson.dumps({"instances": [instance]})
        (image,) = v1.decode(body, manifest, 64).columns["image"]
        assert image.ravel().tolist() == PIXELS.ravel().tolist()
    # One image without the list of instances reads as eight instances of 8×1.
    with pytest.raises(BadRequest, match=r"instance 0 has shape \[8, 1\]; expected \[8, 8, 1\]"):
        v1.decode(orjson.dumps({"instances": PIXELS[0].tolist()}), manifest, 64)


def test_binary_bytes_after_the_last_tensor_are_refused(manifest):
    body, length = as_binary(PIXELS.tobytes())
    with pytest.raises(BadRequest, match="3 bytes follow"):
        v2.decode(body + b"xyz", length, manifest, 64)


def test_the_response_has_the_requested_outputs(manifest):
    predictions = {
        "label": np.array(["7"], object),
        "probabilities": np.full((1, 10), 0.1, np.float32),
    }
    asked = {"id": "q", "inputs": [tensor()], "outputs": [{"name": "label"}]}
    request = v2.decode(orjson.dumps(asked), None, manifest, 64)
    body, length = v2.encode(request, predictions, manifest, "3")
    assert length is None
    assert json.loads(body) == {
        "model_name": "digits",
        "model_version": "3",
        "id": "q",
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": ["7"]}],
    }


def test_binary_outputs_follow_the_json(manifest):
    predictions = {
        "label": np.array(["7"], object),
        "probabilities": np.arange(10, dtype=np.float32)[None],
    }
    asked = {"inputs": [tensor()], "parameters": {"binary_data_output": True}}
    request = v2.decode(orjson.dumps(asked), None, manifest, 64)
    body, length = v2.encode(request, predictions, manifest, "3")
    outputs = json.loads(body[:length])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in outputs]
    assert sizes == [5, 40]
    assert body[length:] == struct.pack("<I", 1) + b"7" + predictions["probabilities"].tobytes()


@pytest.mark.parametrize(
    "instance",
    [{"b64": "YWJj"}, {"image": {"b64": "YWJj"}}],
)
def test_v1_instances_are_records(manifest, instance):
    request = v1.decode(orjson.dumps({"instances": [instance]}), manifest, 64)
    assert request.columns == {"image": [b"abc"]}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"instances": []},
        {"instances": {}},
        {"instances": [{"b64": "?"}]},
        {"instances": [{"image": {"b64": "YWJj"}}], "parameters": {"named": "true"}},
        {"instances": [[[1, 2], [3]]]},
        {"instances": [[[300]]]},
        {"instances": [[]]},
    ],
)
def test_v1_malformed_instances_are_refused(manifest, body):
    with pytest.raises(BadRequest):
        v1.decode(orjson.dumps(body), manifest, 64)


def test_more_rows_than_allowed_are_refused_as_too_large(manifest):
    many = as_json(shape=[65, 1, 1, 1], data=[0] * 65)
    with pytest.raises(PayloadTooLarge, match="65 rows; at most 64"):
        v2.decode(many, None, manifest, 64)
    with pytest.raises(PayloadTooLarge, match="65 rows; at most 64"):
        v1.decode(orjson.dumps({"instances": [[[0]]] * 65}), manifest, 64)


def test_strings_in_place_of_numbers_take_no_memory(manifest):
    """numpy would allocate the longest string's size per element: 100 MB for these 110 KB."""
    body = as_json(shape=[1, 1001], data=["x" * 100_000] + ["a"] * 1000)
    tracemalloc.start()
    with pytest.raises(BadRequest):
        v2.decode(body, None, manifest, 64)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "value", "accepted"),
    [
        ([-1, -1, 4, 1], np.ones((9, 4), int), True),
        ([-1, -1, 4, 1], np.ones((9, 3), int), False),
        ([-1, 9, 4, 1], np.ones((8, 4), int), False),
        ([-1], np.ones(1, int), False),
        ([-1], np.ones((1, 2), int), False),
    ],
)
def test_lists_fit_fields_of_bytes_of_any_shape(shape, value, accepted):
    field = TensorMetadata(name="x", datatype="UINT8", shape=shape)
    model = Manifest.model_construct(name="m", inputs=[field])
    body = orjson.dumps({"instances": [{"x": value.tolist()}]})
    if accepted:
        (found,) = v1.decode(body, model, 4).columns["x"]
        np.testing.assert_array_equal(found, value)
        return
    with pytest.raises(BadRequest, match="has shape"):
        v1.decode(body, model, 4)
