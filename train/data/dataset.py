"""Encoded datasets: splits as memory-mapped arrays, cached under a digest of source and config."""

import hashlib
import inspect
import json
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from cluster import commit, storage
from cluster.errors import CommandFailed, UserError
from train.config import Config
from train.data import preprocess, splits
from train.data.data_report import DataReport
from train.data.fitting import check_fitted_task, define_task, fit_task, read_text_file
from train.data.name_evidence import merge_noise
from train.data.reading import sources
from train.data.reading.csv_files import CsvOptions
from train.data.split_writer import SplitWriter, input_files
from train.decision import apply_options
from train.tasks import ClassTarget, Task
from train.tasks.plugins import import_object
from train.telemetry.work_bar import WorkBar
from train.values.ragged import Ragged, StoredArrays

# Part of every digest. Increase it whenever the encoding changes, so that caches are rebuilt.
ENCODING_VERSION = 8

SUMMARY = "summary.json"


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded splits on disk or at a URL, and the task that encoded them."""

    url: str
    summary: dict[str, Any]

    @property
    def task(self) -> Task:
        return Task.from_dict(self.summary["task"])

    @property
    def nullable(self) -> list[str]:
        """Names of the columns that have missing values."""
        columns = self.summary["report"]["columns"]
        return [name for name, facts in columns.items() if facts["missing"]]

    def with_task(self, task: Task) -> "EncodedDataset":
        """Return the same records with another task, such as one with a decision rule.

        The task must have the features and target that the records were encoded with.
        """
        return replace(self, summary=self.summary | {"task": task.to_dict()})

    def embedded(self) -> Self:
        """Return the same records with vectors in place of texts or images.

        `train.pretrained` computes them for a frozen encoder.
        """
        return replace(self, summary=self.summary | {"embedded": True})

    @property
    def folder(self) -> Path:
        """The local folder of the arrays; downloaded first if the dataset is at a URL."""
        return commit.fetch(self.url, last=commit.DIGESTS)

    def open(self, name: str) -> tuple[StoredArrays, np.ndarray]:
        """Return the inputs and targets of a split, memory-mapped and read-only.

        inputs: {name: array [N, …]}, shapes and dtypes as `task.features.inputs` lists them, and
        `Ragged` where the length is free.
        targets: [N], or [N, K] for labels. Each process compares each file with its digest when it
        first opens it; raises CommandFailed if one differs.
        """
        folder = self.folder
        inputs: dict[str, np.ndarray | Ragged] = {}
        for number, spec in enumerate(self.task.features.inputs):
            values, offsets = (f"{name}/{file}" for file in input_files(number))
            inputs[spec.name] = _open_array(folder, values)
            if spec.ragged:
                inputs[spec.name] = _open_ragged(folder, values, offsets)
        if self.summary.get("embedded"):
            vectors = commit.fetch(self.summary["backbone"]["vectors"], last=commit.DIGESTS)
            for spec in self.task.features.inputs:
                if (vectors / (file := vectors_file(self.task, name, spec.name))).exists():
                    inputs[spec.name] = _open_array(vectors, file)
        return inputs, _open_array(folder, f"{name}/target.npy")


def vectors_file(task: Task, split: str, name: str) -> str:
    """Return the name of the file with the vectors of an input of a split."""
    number = [spec.name for spec in task.features.inputs].index(name)
    return f"{split}-{number}.npy"


@cache
def _check_once(folder: Path, name: str) -> None:
    commit.check_file(folder, name)


def _open_array(folder: Path, name: str) -> np.ndarray:
    try:
        _check_once(folder, name)
    except commit.DamagedFile as error:
        raise CommandFailed(
            f"{error}; run the same command again to re-encode the records."
        ) from error
    array: np.ndarray = np.load(folder / name, mmap_mode="r")
    return array


def _open_ragged(folder: Path, values: str, offsets: str) -> Ragged:
    try:
        return Ragged(_open_array(folder, values), _open_array(folder, offsets))
    except ValueError as error:
        raise CommandFailed(
            f"'{folder / offsets}': {error}; delete this folder, and run the same command again to "
            "re-encode the records."
        ) from error


def read_at_random(inputs: StoredArrays) -> None:
    """Turn off read-ahead for memory-mapped arrays [N, …] that are read in random order.

    Otherwise the operating system may read megabytes for each sample.
    """
    for stored in inputs.values():
        array = stored.values_T if isinstance(stored, Ragged) else stored
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            array.base.madvise(mmap.MADV_RANDOM)


def prepare_dataset(config: Config, root: str, fitted: Task | None = None) -> EncodedDataset:
    """Return the encoded data of a run, from the cache under `root` or encoded and stored there.

    fitted: the task of the bundle that the run starts from, reused without its temperature,
    decision rule and quantile; if None, the task is fitted to the training records.
    Raises UserError that names source and row of a record that cannot be encoded.
    """
    assert config.features, "train.data.schema.inference fills them in"
    assert config.task_type is not None
    data, fitted = config.data, fitted and fitted.undecided()
    urls = {"train": data.train, "valid": data.valid, "test": data.test, "extra": data.extra}
    found = {name: sources.find_source(url) for name, url in urls.items() if url is not None}
    depends_on = [
        ENCODING_VERSION,
        [(source.url, source.fingerprint) for source in found.values()],
        # Without extra records, leave out their options: digests predate these options.
        data.model_dump(exclude=set() if data.extra else {"extra", "extra_fraction"}),
        {column: feature.model_dump() for column, feature in config.features.items()},
        config.text.model_dump(),
        [config.target, config.task_type, config.task],
        _texts_of(config),
        *([fitted.to_dict()] if fitted else []),
    ]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:20]
    url = storage.join_path(root, "data", key)
    fs, path = storage.filesystem(url)
    if not _is_complete(url):
        with (
            commit.atomic_folder(url) as folder,
            storage.scratch_folder(storage.join_path(root, "data")) as scratch,
        ):
            csv = CsvOptions(data.encoding, data.delimiter, data.quotes)
            opened = {
                name: sources.open_source(source, storage.join_path(scratch, name), csv)
                for name, source in found.items()
            }
            size_bytes = sum(source.size_bytes for source in found.values())
            notes = [note for source in found.values() for note in source.notes]
            _write(config, fitted, opened, size_bytes, folder, notes)
    with fs.open(storage.join_path(path, SUMMARY), "r") as file:
        encoded = EncodedDataset(url, json.load(file))
    return encoded.with_task(apply_options(encoded.task, config))


def _is_complete(url: str) -> bool:
    """Whether the encoded data exists and, if local, is undamaged."""
    if storage.is_url(url):
        return storage.exists(storage.join_path(url, commit.DIGESTS))
    folder = Path(url)
    if not (folder / commit.DIGESTS).exists():
        return False
    try:
        for name in commit.committed_files(folder):
            _check_once(folder, name)
    except commit.DamagedFile as error:
        print(f"{error}; encoding the records again.", file=sys.stderr)
        return False
    return True


def _texts_of(config: Config) -> list[str]:
    """Return the tokenizer and the source of custom classes that the config refers to."""
    texts = [read_text_file(config.text.tokenizer)] if config.text.tokenizer else []
    paths = [*(feature.kind for feature in config.features.values()), config.task or ""]
    try:
        return texts + [
            inspect.getsource(sys.modules[import_object(path).__module__])
            for path in paths
            if ":" in path
        ]
    except (ValueError, OSError, TypeError):  # `define_task` reports the error later
        return texts


def _write(
    config: Config,
    fitted: Task | None,
    opened: dict[str, list[sources.RowBlock]],
    size_bytes: int,
    folder: Path,
    notes: list[str],
) -> None:
    task = fitted or define_task(config)
    drop_bad = config.data.bad_records == "drop"
    for name, blocks in opened.items():
        wanted: list[str | None] = [*preprocess.source_columns(task)]
        if name != "extra":  # extra records are never split
            wanted += [config.data.split_key, config.data.split_time]
        url = getattr(config.data, name)
        needed = [column for column in wanted if column]
        sources.check_columns(url, needed, sources.source_schema(blocks).names)
    parts = splits.assign_splits(
        config.data,
        opened,
        preprocess.source_columns(task),
        class_column=task.target.column if isinstance(task.target, ClassTarget) else None,
        date_format=getattr(config.features.get(config.data.split_time or ""), "format", None),
    )
    task, sample = (check_fitted_task if fitted else fit_task)(task, parts[0], drop_bad)
    notes = notes + [f"splits: {part.note}" for part in parts if part.note]
    if config.data.merge_noise and not fitted:
        task, notes = merge_noise(task, sample, notes)
    report = DataReport(task, sample, notes)
    num_records = sum(len(part.codes_N) for part in parts)
    with (
        SplitWriter(folder, task, config.data.train_on_valid) as writer,
        WorkBar("encoding", num_records, "records") as bar,
    ):
        for part in parts:
            for encoded in preprocess.encode_source(
                task, part.blocks, size_bytes=size_bytes, drop_bad=drop_bad
            ):
                for codes_N in part.turns(encoded.rows_N):
                    writer.add(encoded, codes_N)
                report.add(encoded, part.codes_N[encoded.rows_N])
                bar.advance(len(encoded.rows_N))
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
                f"the {name} split of '{split['source']}' is empty after {report.num_bad} bad "
                f"records were dropped; the first is {': '.join(report.bad[0])}"
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


def batch_slices(count: int, size: int) -> Iterator[slice]:
    """Return slices of at most `size` items that cover 0..count-1 in order."""
    return (slice(start, start + size) for start in range(0, count, size))
