"""Fitting a task on training records, or checking that a fitted task can read them.

Shapes: N records, K classes or labels.
"""

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
from train.tasks.custom_classes import check_custom_classes
from train.tasks.plugins import import_object
from train.values.pictures import PictureHeader
from train.values.records import is_missing

# Features are fitted on at most this many training records, drawn at random.
FIT_RECORDS = 50_000

# `target_numbers` returns columns for this many of the most frequent classes only.
MOST_CLASSES = 16

# More bad records than this end the fit: a column's configured kind is probably wrong.
MAX_BAD_FITTED = 100

Fitted = TypeVar("Fitted")


def define_task(config: Config) -> Task:
    """Return the unfitted task of a config.

    Raises UserError if a custom class cannot be imported, `task` is not a subclass of Task, or the
    kinds, their options or the tokenizer are invalid.
    """
    assert config.task_type is not None
    kinds = {column: feature.model_dump() for column, feature in config.features.items()}
    options = config.text.model_dump(exclude={"tokenizer"})
    try:
        own = import_object(config.task) if config.task else Task
        if not (isinstance(own, type) and issubclass(own, Task)):
            raise UserError(f"task is '{config.task}'; expected a subclass of train.tasks.Task.")
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
    """Return the text of a file at a path or URL. Raises UserError if it cannot be read."""
    fs, path = storage.filesystem(url)
    with reading_errors(url), fs.open(path, "r") as file:
        return str(file.read())


def target_numbers(target: Target, values: Any) -> np.ndarray | None:
    """Return targets as numbers; None for custom targets.

    float32 [N], scaled, for regression; otherwise 0/1 indicators, bool or uint8 [N, K], of the
    K ≤ MOST_CLASSES most frequent classes or labels.
    """
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

    The target is fitted on all training records, the features on at most FIT_RECORDS.
    drop_bad: skip unreadable records. Raises UserError that names a record which cannot be read.
    """
    return _seen(task, part, drop_bad, task.target.fit, task.features.fit)


def check_fitted_task(task: Task, part: SplitSource, drop_bad: bool) -> tuple[Task, Columns]:
    """Check that a fitted task can read training records; return it with a sample of them.

    drop_bad: skip unreadable records. Raises UserError that names a record which cannot be read.
    """

    def encode_target(values: Iterable[Any]) -> Any:
        task.target.encode(list(values))
        return task.target

    def encode_features(columns: Columns) -> Any:
        for encoder in task.features.encoders:
            if not isinstance(encoder, Images):  # of images, the sample holds headers only
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
    """Apply of_target and of_features to training records; return the task and the sample."""
    rows_N = np.flatnonzero(part.codes_N == TRAIN)

    def fit_target(rows_N: np.ndarray) -> Any:
        values = _values(part, task.target.column, rows_N)
        return of_target(value for _, value in values)

    # Missing targets are by far the most frequent kind of bad record and would soon exceed
    # MAX_BAD_FITTED, so they are removed first. For labels a missing value means "no label".
    if drop_bad and not isinstance(task.target, LabelsTarget):
        values = _values(part, task.target.column, rows_N)
        rows_N = np.array([row for row, value in values if not is_missing(value)], np.int64)
    target, good_N = _without_bad(fit_target, part, rows_N, drop_bad)
    draws = np.random.Generator(np.random.Philox(0)).permutation(len(good_N))
    sample_N = np.sort(good_N[draws[:FIT_RECORDS]])

    def fit_features(rows_N: np.ndarray) -> tuple[Any, Columns]:
        columns = _sample(task, part, rows_N)
        return of_features(columns), columns

    (features, sample), _ = _without_bad(fit_features, part, sample_N, drop_bad)
    fitted = replace(task, features=features, target=target)
    check_custom_classes(fitted, sample)
    return fitted, sample


def _values(part: SplitSource, column: str, rows_N: np.ndarray) -> Iterator[tuple[int, Any]]:
    for taken_N, columns in _read_rows(part, [column], rows_N):
        yield from zip(taken_N.tolist(), columns[column], strict=True)


def _sample(task: Task, part: SplitSource, rows_N: np.ndarray) -> Columns:
    """Return the given rows as columns; images are large, so only their headers are kept."""
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
    """Return the headers of images, None for missing and unreadable ones.

    Unreadable images are reported later, when they are encoded. Raises InvalidRecord if no image
    can be read.
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
            break  # size and channels are configured, so one readable image suffices
    if first_error and not any(headers):
        raise first_error
    return headers


def _without_bad(
    function: Callable[[np.ndarray], Fitted], part: SplitSource, rows_N: np.ndarray, drop_bad: bool
) -> tuple[Fitted, np.ndarray]:
    """Call `function` with rows; if drop_bad, repeat without each row that it reports as bad.

    Returns the result and the remaining rows. Raises UserError that names the row.
    """
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
    raise UserError(f"more than {MAX_BAD_FITTED} records are bad; the last one is {last}")


def _read_rows(
    part: SplitSource, columns: list[str], rows_N: np.ndarray
) -> Iterator[tuple[np.ndarray, Columns]]:
    """Yield the given rows of a source, batch by batch. rows_N must be sorted."""
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
