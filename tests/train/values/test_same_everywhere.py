"""Values are the same in CSV, Parquet, JSON lines, V1, V2 (JSON or binary) and gRPC."""

import csv
import json
import struct
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from serve.grpc import messages
from serve.protocol import v1, v2
from train.bundle.manifest import TensorMetadata
from train.data.reading import sources
from train.data.reading.samples import sample_source
from train.tasks import Categories, Columns, Numbers
from train.tasks.columns.categorical import FIRST
from train.tasks.columns.scalars import Boolean, Number
from train.values.value_hash import hash_values

FORMATS = ("csv", "parquet", "jsonl")
VALUES = {
    "text": st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12
    ).filter(str.strip),
    "whole": st.integers(-(2**63), 2**63 - 1),
    "decimal": st.floats(allow_nan=False, allow_infinity=False),
    "short decimal": st.decimals(-1000, 1000, places=2).map(float),
    "boolean": st.booleans(),
}


def written(value) -> str:
    return value if isinstance(value, str) else str(value)


def from_file(values: list, kind: str, folder: Path) -> Columns:
    path = folder / f"data.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            rows = csv.writer(file, quoting=csv.QUOTE_ALL)
            rows.writerows([["c"], *([written(value)] for value in values)])
    elif kind == "parquet":
        pa.parquet.write_table(pa.table({"c": values}), path)
    else:
        path.write_text("\n".join(json.dumps({"c": value}) for value in values))
    found = sample_source(sources.find_source(str(path)), len(values))
    path.unlink()
    return found


def from_requests(values: list, manifest) -> dict[str, Columns]:
    texts = [written(value).encode() for value in values]
    raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    header = {"name": "c", "datatype": "BYTES", "shape": [len(values)]}
    as_json = {"inputs": [{**header, "data": [text.decode() for text in texts]}]}
    head = orjson.dumps({"inputs": [{**header, "parameters": {"binary_data_size": len(raw)}}]})
    request = service_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="c", datatype="BYTES", shape=[len(values)])
    tensor.contents.bytes_contents.extend(texts)
    instances = json.dumps({"instances": [{"c": value} for value in values]}).encode()
    return {
        "V1": v1.decode(instances, manifest, 64).columns,
        "V2 as JSON": v2.decode(orjson.dumps(as_json), None, manifest, 64).columns,
        "V2 binary": v2.decode(head + raw, str(len(head)), manifest, 64).columns,
        "gRPC": messages.decode(request, manifest, 64).columns,
    }


@pytest.fixture(scope="module")
def manifest(bundle):
    tensor = TensorMetadata(name="c", datatype="BYTES", shape=[-1])
    return bundle.manifest.model_copy(update={"inputs": [tensor]})


def everywhere(values: list, manifest, folder: Path) -> dict[str, Columns]:
    return {kind: from_file(values, kind, folder) for kind in FORMATS} | from_requests(
        values, manifest
    )


relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("kind", VALUES)
@relaxed
@given(data=st.data())
def test_a_category_has_one_code_in_every_format(kind, data, manifest, tmp_path):
    values = data.draw(st.lists(VALUES[kind], min_size=2, max_size=6))
    found = everywhere(values, manifest, tmp_path)
    for trained_on in FORMATS:
        encoder = Categories(("c",)).fit(found[trained_on])
        codes = {place: encoder.encode(each)["categories"] for place, each in found.items()}
        assert (codes[trained_on] >= FIRST).all()
        for place, codes_NC in codes.items():
            np.testing.assert_array_equal(codes_NC, codes[trained_on], err_msg=place)


@pytest.mark.parametrize("kind", ["whole", "decimal", "short decimal", "boolean"])
@relaxed
@given(data=st.data())
def test_a_number_or_boolean_has_one_value_in_every_format(kind, data, manifest, tmp_path):
    values = data.draw(st.lists(VALUES[kind], min_size=2, max_size=6))
    column = Boolean("c") if kind == "boolean" else Number("c", missing=())
    found = everywhere(values, manifest, tmp_path)
    for trained_on in FORMATS:
        encoder = Numbers((column,)).fit(found[trained_on])
        expected = encoder.encode(found[trained_on])["numbers"]
        for place, each in found.items():
            np.testing.assert_array_equal(encoder.encode(each)["numbers"], expected, err_msg=place)


@pytest.mark.parametrize("kind", VALUES)
@relaxed
@given(data=st.data())
def test_a_record_is_in_the_same_split_in_every_file_format(kind, data, tmp_path):
    values = data.draw(st.lists(VALUES[kind], min_size=2, max_size=6))
    hashes = [hash_values(from_file(values, each, tmp_path)["c"]) for each in FORMATS]
    np.testing.assert_array_equal(hashes[0], hashes[1])
    np.testing.assert_array_equal(hashes[0], hashes[2])
