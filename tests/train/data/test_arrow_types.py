"""Columns of every Arrow type are read, including values that first occur late in a file."""

import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
import pytest

from train.config import validate_config
from train.data import dataset
from train.data.reading import sources
from train.data.reading.samples import sample_source
from train.data.schema import inference

COUNT = 60
DAY = datetime.datetime(2024, 1, 2)
UUIDS = pa.array([bytes([number]) * 16 for number in range(COUNT)], pa.binary(16))
NUMBERS = np.arange(COUNT) % 7
ARRAYS = {
    "float16": pa.array(NUMBERS, pa.float16()),
    "decimal32": pa.array([Decimal(int(number)) for number in NUMBERS], pa.decimal32(5, 2)),
    "decimal256": pa.array([Decimal(int(number)) for number in NUMBERS], pa.decimal256(50, 2)),
    "uint64": pa.array([2**63 + int(number) for number in NUMBERS], pa.uint64()),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array(NUMBERS % 2, pa.int8())),
    "time": pa.array([datetime.time(number) for number in NUMBERS], pa.time64("ns")),
    "timestamp": pa.array(
        [DAY.replace(hour=number) for number in NUMBERS], pa.timestamp("ns", "UTC")
    ),
    "duration": pa.array([datetime.timedelta(hours=int(number)) for number in NUMBERS]),
    "large string": pa.array(NUMBERS.astype(str), pa.large_string()),
    "string view": pa.array(NUMBERS.astype(str), pa.string_view()),
    "binary view": pa.array([b"%d" % number for number in NUMBERS], pa.binary_view()),
    "dictionary": pa.array(NUMBERS.astype(str)).dictionary_encode(),
    "run-end encoded": pa.compute.run_end_encode(pa.array(np.sort(NUMBERS).astype(str))),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), UUIDS),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}'] * COUNT)),
    "struct": pa.array(
        [{"a": np.float16(number)} for number in NUMBERS], pa.struct([("a", pa.float16())])
    ),
    "map": pa.array([[("a", number)] for number in NUMBERS], pa.map_(pa.string(), pa.int64())),
    "list view": pa.array([[number] for number in NUMBERS], pa.list_view(pa.int64())),
    "null": pa.nulls(COUNT),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_column_of_each_type_is_read(name, tmp_path):
    path = tmp_path / "data.arrow"
    late = [1] * 40 + [2] * 20
    table = pa.table({"c": ARRAYS[name], "late": late, "x": NUMBERS * 0.5, "y": NUMBERS % 2})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, 20)
    found = sample_source(sources.find_source(str(path)), 30)
    assert set(found["late"]) == {1, 2}
    config = {"name": "x", "target": "y", "data": {"train": str(path)}}
    config["storage"] = {"path": str(tmp_path / "runs")}
    complete = inference.complete_config(validate_config(config)).config
    read = dataset.prepare_dataset(complete, complete.storage.path)
    assert len(read.open("train")[1]) > 30
