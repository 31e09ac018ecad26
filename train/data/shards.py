"""Shards: records encoded once, kept as memory-mapped arrays, found again by later runs.

A shard directory is named by the digest of all that its content depends on.
"""

import hashlib
import inspect
import json
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from cluster import storage
from cluster.errors import UserError
from train.config import Config
from train.data import encoding, sources, splits
from train.data.encoding import Encoded
from train.data.report import Report
from train.data.splits import NAMES, TRAIN, VALID, Part
from train.tasks import Arrays, Columns, Images, InvalidRecord, LabelsTarget, Task
from train.tasks.plugins import imported
from train.tasks.records import is_missing

# Part of every digest: raise it when encoding changes.
ENCODING_VERSION = 2
SUMMARY = "summary.json"
# Features are fitted on at most so many training records, drawn at random.
FIT_RECORDS = 50_000
# The most bad records to leave out while fitting; more mean that a column is not what it is said.
MAX_BAD_FITTED = 100
Fitted = TypeVar("Fitted")


@dataclass(frozen=True)
class Shards:
    """Encoded splits on disk, and the task that encoded them."""

    url: str
    summary: dict[str, Any]

    @property
    def task(self) -> Task:
        return Task.from_dict(self.summary["task"])

    @property
    def folder(self) -> Path:
        return storage.fetch(self.url, last=SUMMARY)

    def open(self, name: str) -> tuple[Arrays, np.ndarray]:
        """Return the inputs and targets of a split, memory-mapped and read-only."""
        folder = self.folder / name
        inputs = {
            spec.name: np.load(folder / f"input-{number}.npy", mmap_mode="r")
            for number, spec in enumerate(self.task.features.inputs)
        }
        return inputs, np.load(folder / "target.npy", mmap_mode="r")


def read_at_random(inputs: Arrays) -> None:
    """Tell the system not to read ahead: it may be megabytes for a sample, for nothing."""
    for array in inputs.values():
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            array.base.madvise(mmap.MADV_RANDOM)


def prepare(config: Config, root: str, fitted: Task | None = None) -> Shards:
    """Return the encoded data of a run; encode and keep it under `root` if it is not there yet.

    fitted: the task of a bundle that the run begins from; fitted to the training records if None.
    Raises UserError that names source and row of a record that cannot be encoded.
    """
    assert config.features, "train.data.infer names them"
    assert config.learn is not None
    data = config.data
    urls = {"train": data.train, "valid": data.valid, "test": data.test, "extra": data.extra}
    found = {name: sources.find(url) for name, url in urls.items() if url is not None}
    depends_on = [
        ENCODING_VERSION,
        [(source.url, source.fingerprint) for source in found.values()],
        # Without extra records the digest is that of before there were any.
        data.model_dump(exclude=set() if data.extra else {"extra", "extra_share"}),
        {column: feature.model_dump() for column, feature in config.features.items()},
        config.text.model_dump(),
        [config.target, config.learn, config.task],
        _texts_of(config),
        *([fitted.to_dict()] if fitted else []),
    ]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:20]
    url = storage.join(root, "data", key)
    fs, path = storage.filesystem(url)
    summary_path = storage.join(path, SUMMARY)
    if not fs.exists(summary_path):
        with (
            storage.written_whole(url, last=SUMMARY) as folder,
            storage.scratch(storage.join(root, "data")) as scratch,
        ):
            opened = {
                name: sources.open_source(source, storage.join(scratch, name), data.encoding)
                for name, source in found.items()
            }
            size_bytes = sum(source.size_bytes for source in found.values())
            _write(config, fitted, opened, size_bytes, folder)
    with fs.open(summary_path, "r") as file:
        return Shards(url, json.load(file))


def _texts_of(config: Config) -> list[str]:
    """What a run depends on that is named by the config and kept elsewhere: a tokenizer, code."""
    texts = [_text_of(config.text.tokenizer)] if config.text.tokenizer else []
    paths = [feature.kind for feature in config.features.values()] + [config.task or ""]
    try:
        return texts + [
            inspect.getsource(sys.modules[imported(path).__module__])
            for path in paths
            if ":" in path
        ]
    except (ValueError, OSError, TypeError):  # `define` says what is wrong, if anything is
        return texts


def define(config: Config) -> Task:
    """Return a config's task, not yet fitted. Raises UserError for a class that is not there."""
    assert config.learn is not None
    kinds = {column: feature.model_dump() for column, feature in config.features.items()}
    options = config.text.model_dump(exclude={"tokenizer"})
    try:
        own = imported(config.task) if config.task else Task
        if not (isinstance(own, type) and issubclass(own, Task)):
            raise UserError(f"task is '{config.task}', which is no subclass of train.tasks.Task.")
        tokenizer = _text_of(config.text.tokenizer) if config.text.tokenizer else ""
        return own.of(kinds, config.target, config.learn, tokenizer=tokenizer, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def _text_of(url: str) -> str:
    fs, path = storage.filesystem(url)
    with sources.reading(url), fs.open(path, "r") as file:
        return str(file.read())


def _write(
    config: Config,
    fitted: Task | None,
    opened: dict[str, list[sources.Block]],
    size_bytes: int,
    folder: Path,
) -> None:
    task = fitted or define(config)
    drop_bad = config.data.bad_records == "drop"
    for name, blocks in opened.items():
        wanted: list[str | None] = [*encoding.columns_of(task)]
        if name != "extra":  # which is not divided
            wanted += [config.data.split_key, config.data.split_time]
        url = getattr(config.data, name)
        needed = [column for column in wanted if column]
        sources.check_columns(url, needed, sources.schema(blocks).names)
    time = config.features.get(config.data.split_time or "")
    parts = splits.assign(config.data, opened, time.format if time else None)
    task, sample = (check if fitted else fit)(task, parts[0], drop_bad)
    report = Report(task, sample)
    with Writer(folder, task, config.data.train_on_valid) as writer:
        for part in parts:
            for encoded in encoding.encode(
                task, part.blocks, size_bytes=size_bytes, drop_bad=drop_bad
            ):
                for codes_N in part.turns(encoded.rows_N):
                    writer.add(encoded, codes_N)
                report.add(encoded, part.codes_N[encoded.rows_N])
    counts: dict[str, dict[str, Any]] = {
        name: {
            "source": getattr(config.data, name) or config.data.train,
            "num_records": count,
            "digest": writer.digest_of(name),
        }
        for name, count in writer.counts.items()
    }
    if config.data.extra:
        counts["train"]["extra"] = config.data.extra
    for name, split in counts.items():
        if not split["num_records"]:
            raise UserError(
                f"no record is left in the {name} split of '{split['source']}'; "
                f"{report.num_bad} were bad, the first: {': '.join(report.bad[0])}"
                if report.bad
                else f"the {name} split of '{split['source']}' is empty."
            )
    report.write(folder, counts)
    summary = {
        "task": task.to_dict(),
        "splits": counts,
        "digest": writer.digest,
        "report": report.to_dict(),
    }
    (folder / SUMMARY).write_text(json.dumps(summary))


def fit(task: Task, part: Part, drop_bad: bool) -> tuple[Task, Columns]:
    """Fit a task on training records; return it with the sample that its features were fitted on.

    The target sees every training record, the features at most FIT_RECORDS. Raises UserError.
    """
    return _seen(task, part, drop_bad, task.target.fit, task.features.fit)


def check(task: Task, part: Part, drop_bad: bool) -> tuple[Task, Columns]:
    """See whether a fitted task can read training records; return it with a sample of them.

    Raises UserError.
    """

    def encode_target(values: Iterable[Any]) -> Any:
        task.target.encode(list(values))
        return task.target

    def encode_features(columns: Columns) -> Any:
        for encoder in task.features.encoders:
            if not isinstance(encoder, Images):  # of which the sample has one
                encoder.encode(columns)
        return task.features

    return _seen(task, part, drop_bad, encode_target, encode_features)


def _seen(
    task: Task,
    part: Part,
    drop_bad: bool,
    of_target: Callable[[Iterable[Any]], Any],
    of_features: Callable[[Columns], Any],
) -> tuple[Task, Columns]:
    """Return what is made of training records: target, features and the sample for the latter."""
    rows_N = np.flatnonzero(part.codes_N == TRAIN)

    def fit_target(rows_N: np.ndarray) -> Any:
        values = _values(part, task.target.column, rows_N)
        return of_target(value for _, value in values)

    if drop_bad and not isinstance(task.target, LabelsTarget):  # by far the most frequent
        values = _values(part, task.target.column, rows_N)
        rows_N = np.array([row for row, value in values if not is_missing(value)], np.int64)
    target, good_N = _without_bad(fit_target, part, rows_N, drop_bad)
    draws = np.random.Generator(np.random.Philox(0)).permutation(len(good_N))
    sample_N = np.sort(good_N[draws[:FIT_RECORDS]])

    def fit_features(rows_N: np.ndarray) -> tuple[Any, Columns]:
        columns = _sample(task, part, rows_N)
        return of_features(columns), columns

    (features, sample), _ = _without_bad(fit_features, part, sample_N, drop_bad)
    return replace(task, features=features, target=target), sample


def _values(part: Part, column: str, rows_N: np.ndarray) -> Iterator[tuple[int, Any]]:
    for taken_N, columns in _read_rows(part, [column], rows_N):
        yield from zip(taken_N.tolist(), columns[column], strict=True)


def _sample(task: Task, part: Part, rows_N: np.ndarray) -> Columns:
    """The records of some rows; of images, which are large, only up to the first there is."""
    images = list(task.features.images)
    names = [name for name in encoding.columns_of(task) if name not in images]
    collected: dict[str, list[Any]] = {name: [] for name in names}
    for _, columns in _read_rows(part, names, rows_N):
        for name, values in columns.items():
            collected[name].extend(values)
    for name in images:
        collected[name] = []
        for _, value in _values(part, name, rows_N):
            collected[name].append(value)
            if not is_missing(value):
                break
    return collected


def _without_bad(
    function: Callable[[np.ndarray], Fitted], part: Part, rows_N: np.ndarray, drop_bad: bool
) -> tuple[Fitted, np.ndarray]:
    """Call with rows of a source; where bad ones are dropped, again without those it names."""
    for _ in range(MAX_BAD_FITTED + 1):
        try:
            return function(rows_N), rows_N
        except InvalidRecord as error:
            if error.row is None:
                raise UserError(f"'{part.url}': {error}") from error
            place = splits.place(part.blocks, int(rows_N[error.row]))
            last = UserError(f"{place}: {error}")
            if not drop_bad:
                raise last from error
            rows_N = np.delete(rows_N, error.row)
    raise UserError(f"more than {MAX_BAD_FITTED} records are bad; the last is {last}")


def _read_rows(
    part: Part, columns: list[str], rows_N: np.ndarray
) -> Iterator[tuple[np.ndarray, Columns]]:
    """The given rows of a source, which are in order, batch by batch."""
    for block in part.blocks:
        start = block.start
        first, end = np.searchsorted(rows_N, [start, start + block.num_rows])
        if first == end:
            continue
        for batch in block.read(columns):
            first, end = np.searchsorted(rows_N, [start, start + batch.num_rows])
            if first < end:
                taken_N = rows_N[first:end]
                yield taken_N, sources.columns(batch.take(pa.array(taken_N - start)))
            start += batch.num_rows
            if end == len(rows_N):
                return


class Writer:
    """Appends encoded records to the arrays of their splits.

    train_on_valid: those of the validation split are in the training split too.
    """

    def __init__(self, folder: Path, task: Task, train_on_valid: bool = False) -> None:
        self._members = {TRAIN: [TRAIN, VALID] if train_on_valid else [TRAIN]}
        self.counts = dict.fromkeys(NAMES, 0)
        self._shapes: dict[Path, tuple[np.dtype, tuple[int, ...]]] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._digests: dict[Path, Any] = {}
        self._folder = folder
        self._names = [spec.name for spec in task.features.inputs]

    def __enter__(self) -> "Writer":
        for name in NAMES:
            (self._folder / name).mkdir()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for path, file in self._files.items():
            file.seek(0)
            self._write_header(path, self.counts[path.parent.name])
            file.close()

    @property
    def digest(self) -> str:
        """Of all that was written."""
        return self._digest(sorted(self._digests))

    def digest_of(self, name: str) -> str:
        """Of what was written of one split."""
        return self._digest([path for path in sorted(self._digests) if path.parent.name == name])

    def _digest(self, paths: Iterable[Path]) -> str:
        parts = [self._digests[path].hexdigest() for path in paths]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def add(self, encoded: Encoded, codes_N: np.ndarray) -> None:
        """codes_N: the split of each record, or NOWHERE."""
        for code, name in enumerate(NAMES):
            chosen_N = np.isin(codes_N, self._members.get(code, [code]))
            if not chosen_N.any():
                continue
            folder = self._folder / name
            for number, input_name in enumerate(self._names):
                self._append(folder / f"input-{number}.npy", encoded.inputs[input_name][chosen_N])
            self._append(folder / "target.npy", encoded.targets_N[chosen_N])
            self.counts[name] += int(chosen_N.sum())

    def _append(self, path: Path, array: np.ndarray) -> None:
        if path not in self._files:
            self._files[path] = path.open("w+b")
            self._shapes[path] = array.dtype, array.shape[1:]
            self._digests[path] = hashlib.sha256()
            self._write_header(path, 0)
        data = np.ascontiguousarray(array)
        self._files[path].write(data.data if data.size else b"")
        self._digests[path].update(data)

    def _write_header(self, path: Path, count: int) -> None:
        # numpy leaves room in the header for a count that grows, so it keeps its length.
        dtype, shape = self._shapes[path]
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count, *shape),
        }
        np.lib.format.write_array_header_1_0(self._files[path], header)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover 0..count in order, each of at most `size`."""
    return (slice(start, start + size) for start in range(0, count, size))
