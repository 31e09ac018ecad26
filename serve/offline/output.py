"""The output files of offline inference: parts, row counts, and records that were rejected."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from cluster import commit, storage

# Readers of a Parquet folder skip names that begin with _.
PLAN, SUMMARY, BAD, INPUT = "_plan.json", "_summary.json", "_bad", "_input"


def part_path(output: str, number: int, *folder: str) -> str:
    """Return the path of a part's file; folder: a subfolder of the output, such as BAD."""
    return storage.join_path(output, *folder, f"part-{number:06}.parquet")


def part_exists(output: str, number: int) -> bool:
    return storage.exists(part_path(output, number))


def count_rows(output: str, num_parts: int) -> dict[str, int]:
    """Return how many rows were predicted and how many were rejected, read from the files."""
    counts = {"rows": 0, "bad": 0}
    for number in range(num_parts):
        for name, folder in (("rows", ()), ("bad", (BAD,))):
            part = part_path(output, number, *folder)
            if storage.exists(part):
                fs, path = storage.filesystem(part)
                with fs.open(path, "rb") as stream:
                    counts[name] += pa.parquet.ParquetFile(stream).metadata.num_rows
    return counts


def write_parquet(table: pa.Table, target: str) -> None:
    """Write a Parquet file at a path or URL, complete or not at all."""
    with commit.atomic_file(target) as stream:
        pa.parquet.write_table(table, stream)


def write_json(target: str, value: Any) -> None:
    """Write a JSON file at a path or URL, complete or not at all."""
    commit.write_atomic(target, json.dumps(value).encode())
