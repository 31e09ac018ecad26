"""Fitting a task on training records, or checking that a fitted one can read them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from cluster import storage
from cluster.errors import UserError
from train.config import Config
from train.data import preprocess, splits
from train.data.reading import sources
from train.data.reading.folders import reading_errors
from train.data.splits import TRAIN, SplitSource
from train.tasks import (
    Columns,
    Images,
    InvalidRecord,
    LabelsTarget,
    NamedTarget,
    Target,
    Task,
    ValueTarget,
)
from train.tasks.plugins import import_object
from train.values.pictures import PictureHeader
from train.values.records import is_missing

# Features are fitted on at most so many training records, drawn at random.
FIT_RECORDS = 50_000

# If a target has more classes, only the most frequent ones are tested.
MOST_CLASSES = 16

# The most bad records to leave out while fitting; more mean that a column is not what it is said.
MAX_BAD_FITTED = 100

Fitted = TypeVar("Fitted")


def define_task(config: Config) -> Task:
    """Return a config's task, not yet fitted. Raises UserError for a class that is not there."""
    assert config.task_type is not None
    kinds = {column: feature.model_dump() for column, feature in config.features.items()}
    options = config.text.model_dump(exclude={"tokenizer"})
    try:
        own = import_object(config.task) if config.task else Task
        if not (isinstance(own, type) and issubclass(own, Task)):
            raise UserError(f"task is '{config.task}', which is no subclass of train.tasks.Task.")
        tokenizer = read_text_file(config.text.tokenizer) if config.text.tokenizer else ""
        return own.of(
            kinds,
            config.target,
            config.task_type,
            decimal=config.data.decimal,
            tokenizer=tokenizer,
            **options,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def read_text_file(url: str) -> str:
    fs, path = storage.filesystem(url)
    with reading_errors(url), fs.open(path, "r") as file:
        return str(file.read())


def target_numbers(target: Target, values: Any) -> np.ndarray | None:
    """Targets as numbers [N], or as 0 and 1 of the most frequent names [N, K]."""
    if isinstance(target, ValueTarget):
        return target.encode(values)
    if isinstance(target, NamedTarget):
        most = sorted(range(len(target.classes)), key=lambda index: -target.counts[index])
        codes = target.encode(values)
        if codes.ndim == 1:
            return codes[:, None] == np.array(most[:MOST_CLASSES])
        return codes[:, most[:MOST_CLASSES]]
    return None


def fit_task(task: Task, part: SplitSource, drop_bad: bool) -> tuple[Task, Columns]:
    """Fit a task on training records; return it with the sample that its features were fitted on.

    The target sees every training record, the features at most FIT_RECORDS. Raises UserError.
    """
    return _seen(task, part, drop_bad, task.target.fit, task.features.fit)


def check_fitted_task(task: Task, part: SplitSource, drop_bad: bool) -> tuple[Task, Columns]:
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
    part: SplitSource,
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


def _values(part: SplitSource, column: str, rows_N: np.ndarray) -> Iterator[tuple[int, Any]]:
    for taken_N, columns in _read_rows(part, [column], rows_N):
        yield from zip(taken_N.tolist(), columns[column], strict=True)


def _sample(task: Task, part: SplitSource, rows_N: np.ndarray) -> Columns:
    """The records of some rows; of images, which are large, only the headers."""
    images = {each.column: each for each in task.features.encoders if isinstance(each, Images)}
    names = [name for name in preprocess.source_columns(task) if name not in images]
    collected: dict[str, list[Any]] = {name: [] for name in names}
    for _, columns in _read_rows(part, names, rows_N):
        for name, values in columns.items():
            collected[name].extend(values)
    for name, encoder in images.items():
        collected[name] = _headers(encoder, (value for _, value in _values(part, name, rows_N)))
    return collected


def _headers(encoder: Images, values: Iterable[Any]) -> list[PictureHeader | None]:
    """The headers of images, None of what is missing or none, which is said when it is encoded.

    Raises InvalidRecord if no image can be read.
    """
    headers: list[PictureHeader | None] = []
    first_error = None
    for row, value in enumerate(values):
        try:
            headers.append(None if is_missing(value) else encoder.header(value))
        except InvalidRecord as error:
            error.row = row
            first_error = first_error or error
            headers.append(None)
        if headers[-1] is not None and encoder.size and encoder.channels:
            break  # nothing more is to be found out
    if first_error and not any(headers):
        raise first_error
    return headers


def _without_bad(
    function: Callable[[np.ndarray], Fitted], part: SplitSource, rows_N: np.ndarray, drop_bad: bool
) -> tuple[Fitted, np.ndarray]:
    """Call with rows of a source; where bad ones are dropped, again without those it names."""
    for _ in range(MAX_BAD_FITTED + 1):
        try:
            return function(rows_N), rows_N
        except InvalidRecord as error:
            if error.row is None:
                raise UserError(f"'{part.url}': {error}") from error
            place = splits.row_location(part.blocks, int(rows_N[error.row]))
            last = UserError(f"{place}: {error}")
            if not drop_bad:
                raise last from error
            rows_N = np.delete(rows_N, error.row)
    raise UserError(f"more than {MAX_BAD_FITTED} records are bad; the last is {last}")


def _read_rows(
    part: SplitSource, columns: list[str], rows_N: np.ndarray
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
                yield taken_N, sources.batch_columns(batch.take(pa.array(taken_N - start)))
            start += batch.num_rows
            if end == len(rows_N):
                return
