"""Shards: records encoded once, kept as memory-mapped arrays, found again by later runs.

A shard directory is named by the digest of all that its content depends on.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from cluster.errors import UserError
from train.config import Config
from train.data import sources
from train.data.splits import Split, split
from train.tasks import Arrays, ClassTarget, ImageFeatures, InvalidRecord, Task

# Part of every digest: raise it when encoding changes.
ENCODING_VERSION = 1
SUMMARY = "summary.json"
CHUNK = 256


@dataclass(frozen=True)
class Shards:
    """Encoded splits on disk, and the task that encoded them."""

    url: str
    summary: dict[str, Any]

    @property
    def task(self) -> Task:
        return Task.from_dict(self.summary["task"])

    def open(self, name: str) -> tuple[Arrays, np.ndarray]:
        """Return the inputs and targets of a split, memory-mapped and read-only."""
        folder = storage.fetch(self.url, last=SUMMARY) / name
        inputs = {
            spec.name: np.load(folder / f"input-{spec.name}.npy", mmap_mode="r")
            for spec in self.task.features.inputs
        }
        return inputs, np.load(folder / "target.npy", mmap_mode="r")


def prepare(config: Config, root: str) -> Shards:
    """Return the encoded data of a run; encode and keep it under `root` if it is not there yet.

    Raises UserError that names source and row of a record that cannot be encoded.
    """
    urls = [url for url in (config.data.train, config.data.valid, config.data.test) if url]
    depends_on = [
        ENCODING_VERSION,
        [(url, sources.fingerprint(url)) for url in urls],
        config.data.model_dump(),
        config.image.model_dump(),
        config.target,
    ]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:20]
    url = storage.join(root, "data", key)
    fs, path = storage.filesystem(url)
    summary_path = storage.join(path, SUMMARY)
    if not fs.exists(summary_path):
        with storage.written_whole(url, last=SUMMARY) as folder:
            _write(config, folder)
    with fs.open(summary_path, "r") as file:
        return Shards(url, json.load(file))


def _write(config: Config, folder: Path) -> None:
    splits = split(config.data, [config.image.column, config.target])
    train = splits["train"]
    image = config.image
    features = ImageFeatures(image.column, image.size, image.channels)
    target = ClassTarget(config.target)
    with _named(train.url, train.rows[0]):
        features = features.fit(train.records)
    for row, record in zip(train.rows, train.records, strict=True):
        with _named(train.url, row):
            target.label(record[config.target])
    with _named(train.url):
        target = target.fit(record[config.target] for record in train.records)
    task = Task(features, target)
    counts, digest = {}, hashlib.sha256()
    for name, part in splits.items():
        _encode(task, part, folder / name, digest)
        counts[name] = {"source": part.url, "num_records": len(part.records)}
    summary = {"task": task.to_dict(), "splits": counts, "digest": digest.hexdigest()}
    (folder / SUMMARY).write_text(json.dumps(summary))


def _encode(task: Task, part: Split, folder: Path, digest: Any) -> None:
    """Write the arrays of one split, several threads decoding; feed their bytes to `digest`."""
    folder.mkdir()
    count = len(part.records)
    inputs = {
        spec.name: np.lib.format.open_memmap(
            folder / f"input-{spec.name}.npy", "w+", spec.dtype, (count, *spec.shape)
        )
        for spec in task.features.inputs
    }
    targets = np.lib.format.open_memmap(folder / "target.npy", "w+", np.int64, (count,))

    def encode_chunk(start: int) -> None:
        for index in range(start, min(start + CHUNK, count)):
            with _named(part.url, part.rows[index]):
                arrays, targets[index] = task.encode(part.records[index])
            for name, array in arrays.items():
                inputs[name][index] = array

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(encode_chunk, start) for start in range(0, count, CHUNK)]
        try:
            for future in futures:
                future.result()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    for array in (*inputs.values(), targets):
        array.flush()
        digest.update(array)


@contextmanager
def _named(url: str, row: int | None = None) -> Iterator[None]:
    """Add to what is wrong with a record where it is from."""
    try:
        yield
    except InvalidRecord as error:
        place = f"'{url}'" if row is None else f"'{url}', row {row}"
        raise UserError(f"{place}: {error}") from error


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover 0..count in order, each of at most `size`."""
    return (slice(start, start + size) for start in range(0, count, size))
