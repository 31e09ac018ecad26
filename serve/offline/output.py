"""The files of an offline inference: parts, their counts, and what was left out."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from cluster import commit, storage

# Readers of a folder of Parquet pass over names that begin with _.
PLAN, SUMMARY, BAD, INPUT = "_plan.json", "_summary.json", "_bad", "_input"


def part_path(output: str, number: int, *folder: str) -> str:
    return storage.join_path(output, *folder, f"part-{number:06}.parquet")


def part_exists(output: str, number: int) -> bool:
    return storage.exists(part_path(output, number))


def count_rows(output: str, num_parts: int) -> dict[str, int]:
    """Rows predicted and rows left out, as the files say."""
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
    with commit.atomic_file(target) as stream:
        pa.parquet.write_table(table, stream)


def write_json(target: str, value: Any) -> None:
    commit.write_atomic(target, json.dumps(value).encode())
