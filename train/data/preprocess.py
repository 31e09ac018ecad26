"""Encoding: turns the blocks of a source into arrays, in parallel and in order.

Small sources are encoded by threads, large ones by Ray Data on the whole cluster. Either way only
a few batches are in memory at once. Shapes: N records.
"""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from cluster import connect
from cluster.errors import UserError
from train.data.reading import sources
from train.data.reading.sources import RowBlock
from train.tasks import InvalidRecord, Task, TensorSpec, plugins
from train.values.ragged import Ragged, StoredArrays
from train.values.records import encode_valid, num_rows

# Ray Data takes seconds to start; larger sources save more time than that.
LARGE_BYTES = 256 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncodedBlock:
    """Encoded records of a source.

    rows_N: int64 [N], row numbers in the source. digests_N: uint64 [N], see `record_digests`.
    bad: location and reason of each record that was dropped.
    """

    rows_N: np.ndarray
    inputs: StoredArrays
    targets_N: np.ndarray
    digests_N: np.ndarray
    bad: list[tuple[str, str]]


def encode_source(
    task: Task, blocks: Sequence[RowBlock], *, size_bytes: int, drop_bad: bool
) -> Iterator[EncodedBlock]:
    """Yield a source's records, encoded and in order.

    drop_bad: drop records that cannot be encoded and list them in EncodedBlock.bad; otherwise
    raises UserError that names file and row. size_bytes: decides between threads and Ray Data.
    """
    if size_bytes > LARGE_BYTES:
        yield from _by_ray_data(task, blocks, drop_bad)
        return

    def encoded(read: tuple[RowBlock, int, pa.RecordBatch]) -> EncodedBlock:
        return _encode_batch(task, *read, drop_bad)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        reads = (read for block in blocks for read in _read(task, block))
        yield from _ahead(pool, encoded, reads, 2 * threads)


def _read(task: Task, block: RowBlock) -> Iterator[tuple[RowBlock, int, pa.RecordBatch]]:
    """Yield the batches of a block, each with the number of its first row in the source."""
    row = block.start
    for batch in block.read(source_columns(task), task.features.row_bytes):
        yield block, row, batch
        row += batch.num_rows


def source_columns(task: Task) -> list[str]:
    """Return the columns that a task reads from a source, each once."""
    return list(dict.fromkeys([*task.features.columns, task.target.column]))


def _encode_batch(
    task: Task, block: RowBlock, start: int, batch: pa.RecordBatch, drop_bad: bool
) -> EncodedBlock:
    columns, count = sources.batch_columns(batch), batch.num_rows
    try:
        if drop_bad:
            encoded, kept_N, wrong = encode_valid(task.encode, columns, count)
        else:
            encoded, kept_N, wrong = task.encode(columns), np.arange(count), []
    except InvalidRecord as error:
        place = f"'{block.origin}'" if error.row is None else block.place(start + error.row)
        raise UserError(f"{place}: {error}") from error
    if encoded is None:
        inputs = {spec.name: spec.empty() for spec in task.features.inputs}
        encoded = inputs, task.target.encode([])
    inputs, targets_N = encoded
    bad = [(block.place(start + row), reason) for row, reason in wrong]
    stored = {
        spec.name: Ragged.of(inputs[spec.name]) if spec.ragged else inputs[spec.name]
        for spec in task.features.inputs
    }
    return EncodedBlock(start + kept_N, stored, targets_N, record_digests(stored), bad)


def record_digests(inputs: StoredArrays) -> np.ndarray:
    """Return a 64-bit digest of each record's inputs, uint64 [N]. inputs: {name: array [N, …]}."""
    arrays = [
        array if isinstance(array, Ragged) else np.ascontiguousarray(array)
        for array in inputs.values()
    ]
    found_N = np.zeros(num_rows(inputs), np.uint64)
    for row in range(len(found_N)):
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            if isinstance(array, Ragged):  # its length shows where the next input begins
                digest.update(len(array[row]).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array[row]).data)
        found_N[row] = int.from_bytes(digest.digest(), "little")
    return found_N


def _ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    most: int,
) -> Iterator[Result]:
    """Yield results in the order of the items, computing at most `most` of them ahead."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _by_ray_data(task: Task, blocks: Sequence[RowBlock], drop_bad: bool) -> Iterator[EncodedBlock]:
    from ray.exceptions import RayTaskError

    ray_data = connect.import_ray_data()
    state, allowed = task.to_dict(), plugins.allowed_modules()
    specs = task.features.inputs
    target = task.target.encode([])

    def encode_blocks(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        plugins.allow_modules(allowed)
        own = Task.from_dict(state)
        for number in batch["block"]:
            for read in _read(own, blocks[number]):
                yield _packed(_encode_batch(own, *read, drop_bad))

    ray_data.DataContext.get_current().execution_options.preserve_order = True
    numbers = [{"block": number} for number in range(len(blocks))]
    plan = ray_data.from_items(numbers, override_num_blocks=len(numbers))
    plan = plan.map_batches(encode_blocks, batch_size=1, batch_format="numpy")
    try:
        for row in plan.iter_rows():
            yield _unpacked(row, specs, target)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        raise


def _packed(encoded: EncodedBlock) -> dict[str, Any]:
    """Return one row for Ray Data: the arrays as bytes; dtypes and shapes follow from the task."""
    arrays = [encoded.rows_N, encoded.targets_N, encoded.digests_N]
    for array in encoded.inputs.values():
        arrays += [array.values_T, array.offsets] if isinstance(array, Ragged) else [array]
    return {
        **{f"{number}": [array.tobytes()] for number, array in enumerate(arrays)},
        "bad": [json.dumps(encoded.bad)],
    }


def _unpacked(row: dict[str, Any], specs: Sequence[TensorSpec], target: np.ndarray) -> EncodedBlock:
    rows_N = np.frombuffer(row["0"], np.int64)
    packed = (row[f"{number}"] for number in itertools.count(3))
    inputs: dict[str, np.ndarray | Ragged] = {}
    for spec in specs:
        values = np.frombuffer(next(packed), spec.dtype)
        if spec.ragged:
            offsets = np.frombuffer(next(packed), np.int64)
            inputs[spec.name] = Ragged(values.reshape(offsets[-1], *spec.shape[1:]), offsets)
        else:
            inputs[spec.name] = values.reshape(len(rows_N), *spec.shape)
    return EncodedBlock(
        rows_N,
        inputs,
        np.frombuffer(row["1"], target.dtype).reshape(len(rows_N), *target.shape[1:]),
        np.frombuffer(row["2"], np.uint64),
        [(place, reason) for place, reason in json.loads(row["bad"])],
    )
