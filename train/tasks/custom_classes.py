"""A check of custom encoders and targets before anything is trained."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from cluster.errors import UserError, error_line
from train.tasks.columns.image import Images
from train.tasks.features import ENCODERS, encoder_class
from train.tasks.task import TARGETS, Task
from train.values.ragged import FREE
from train.values.records import Arrays, Columns, InvalidRecord

# Records that custom encoders encode before all are encoded.
CHECKED_RECORDS = 8


def check_custom_classes(task: Task, columns: Columns) -> None:
    """Check custom encoders and targets: what they encode, and whether their state restores them.

    columns: values of training records, of which the first few are encoded. Raises UserError that
    names the class and its mistake.
    """
    images = {each.column for each in task.features.encoders if isinstance(each, Images)}
    few = {name: _as_encoded(values[:CHECKED_RECORDS]) for name, values in columns.items()}
    count = max(map(len, few.values()), default=0)
    for encoder in task.features.encoders:
        if type(encoder) in ENCODERS.values():
            continue
        restored = _restored(encoder, ENCODERS)
        # The sample holds headers of images, not the images.
        if isinstance(encoder, Images) or images & {spec.name for spec in encoder.fields}:
            continue
        with suppress(InvalidRecord):  # reported when all records are encoded
            arrays = _called(encoder, "encode", few)
            _check_arrays(encoder, arrays, count)
            _check_same(encoder, arrays, restored, few)
    if type(task.target) not in TARGETS.values():
        _restored(task.target, TARGETS)


def _as_encoded(values: Sequence[Any] | np.ndarray) -> Any:
    """Return values as encoders get them: numbers as an array, others as a list."""
    numbers = all(isinstance(value, int | float) for value in values)
    return np.asarray(values) if numbers else list(values)


def _path(part: Any) -> str:
    return f"{type(part).__module__}:{type(part).__qualname__}"


def _called(part: Any, name: str, *arguments: Any) -> Any:
    """Call a method of a custom object. Raises UserError for any error but InvalidRecord."""
    try:
        return getattr(part, name)(*arguments)
    except InvalidRecord:
        raise
    except Exception as error:
        raise UserError(f"{_path(part)}.{name} fails: {error_line(error)}.") from error


def _restored(part: Any, known: Mapping[str, Any]) -> Any:
    """Return the object that the saved state of a custom object gives. Raises UserError."""
    state = _called(part, "to_dict")
    try:
        state = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise UserError(f"{_path(part)}.to_dict: {error_line(error)}.") from error
    kind = state.get("kind") if isinstance(state, dict) else None
    try:
        found = encoder_class({"kind": kind}, known)
    except ValueError:  # it is in no allowed module, or names nothing
        found = None
    if found is not type(part):
        raise UserError(
            f"{_path(part)}.to_dict returns the kind {kind!r}, by which a model does not find the "
            "class; return the path of the class itself."
        )
    return _called(part, "from_dict", state)


def _check_arrays(encoder: Any, arrays: Any, count: int) -> None:
    """Check that an encoder returned the arrays that its `inputs` describe. Raises UserError."""
    wanted = [(spec.name, np.dtype(spec.dtype), (count, *spec.shape)) for spec in encoder.inputs]
    ranks = {spec.name: 1 + len(spec.shape) for spec in encoder.inputs if spec.ragged}
    if isinstance(arrays, Mapping):
        found = [
            (name, getattr(array, "dtype", type(array).__name__), np.shape(array))
            for name, array in arrays.items()
        ]
        # Where the length is free, any of at least 1 will do.
        found = [
            (name, dtype, (shape[0], FREE, *shape[2:]))
            if ranks.get(name) == len(shape) and shape[1]
            else (name, dtype, shape)
            for name, dtype, shape in found
        ]
        words = _array_words(found)
    else:
        found, words = [], type(arrays).__name__
    if found != wanted:
        raise UserError(
            f"{_path(encoder)}.encode of {count} records returns {words}; "
            f"its inputs are {_array_words(wanted)}."
        )


def _check_same(encoder: Any, arrays: Arrays, restored: Any, few: Columns) -> None:
    """Check that a restored encoder encodes as the original does. Raises UserError."""
    try:
        again = _called(restored, "encode", few)
    except InvalidRecord as error:
        raise UserError(
            f"{_path(encoder)}.from_dict returns an encoder that refuses a record which the "
            f"original encodes: {error_line(error)}."
        ) from error
    for name, array in arrays.items():
        same = name in again and np.array_equal(
            array, again[name], equal_nan=np.issubdtype(array.dtype, np.floating)
        )
        if not same:
            raise UserError(
                f"{_path(encoder)}.from_dict returns an encoder that encodes '{name}' differently; "
                "to_dict must return all that `fit` learned."
            )


def _array_words(arrays: Iterable[tuple[str, Any, tuple[int, ...]]]) -> str:
    return ", ".join(f"'{name}' {dtype} {list(shape)}" for name, dtype, shape in arrays)
