"""Inference of the task: what each column is, and what of a run suits it, found by looking.

Only what the config leaves open is filled in.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.errors import UserError
from train.config import LAST, Config, validate_config
from train.data import sources, warm_start
from train.data.warm_start import CompletedConfig, fill_missing
from train.tasks import InvalidRecord
from train.tasks.image import IMAGE_SIGNATURES
from train.tasks.numeric import FALSE, TRUE, Boolean, Date, Number
from train.tasks.records import is_missing, shorten, to_text

LOOKED_AT = 10_000
# Other than ISO 8601. The first in which all dates of a column can be read is taken.
DATE_FORMATS = (
    *("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S"),
    *("%m/%d/%Y", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p"),
    *("%d/%m/%Y", "%d/%m/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M:%S"),
)
MAX_CLASSES, MAX_NAMED_CLASSES = 100, 1000
# How a column is called that pandas makes of a frame's index.
INDEX_NAMES = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
# Of categories, at most this share of the known values is different; else a column names records.
MAX_DISTINCT_SHARE = 0.5
TEXT_WORDS = 3.0
SMALL = 2_000
# A table of more bytes has some hundred thousand records.
LARGE_BYTES = 32 << 20
LOSS = "valid_loss"
# Parts for cross-validation where records are few.
FOLDS = 5


@dataclass(frozen=True)
class InferredColumn:
    """What a column is, or None where it is left out, and why."""

    column: str
    kind: str | None
    why: str
    format: str | None = None


def complete_config(config: Config) -> CompletedConfig:
    """Fill in what is left open: the features, the task type, and defaults that suit them.

    A run that begins from a bundle takes these from the bundle. Raises UserError if the records or
    the bundle do not allow it.
    """
    if config.init is None:
        return CompletedConfig(_inferred(config))
    config, bundle = warm_start.inherit_options(config)
    return CompletedConfig(_inferred(config), bundle)


def _inferred(config: Config) -> Config:
    """Infer from the records what is left open."""
    if config.task is not None and not config.features:
        raise UserError(
            f"task is '{config.task}', and features are not listed; a task of your own needs them."
        )
    if config.features and config.task_type is not None and _is_settled(config):
        return config
    source = sources.find_source(config.data.train)
    looked_at = sources.source_head(source, LOOKED_AT, config.data.encoding)
    wanted = [config.target, *config.data.drop, *config.features]
    sources.check_columns(config.data.train, wanted, list(looked_at))
    found: dict[str, Any] = {}
    decisions = []
    if config.task_type is None:
        task_type, why = infer_task_type(looked_at[config.target])
        found["task_type"] = task_type
        decisions.append(InferredColumn(config.target, f"target: {task_type}", why))
    if not config.features:
        columns = {name: values for name, values in looked_at.items() if name != config.target}
        chosen = [
            InferredColumn(name, None, "data.drop")
            if name in config.data.drop
            else InferredColumn(name, None, "data.split_key")
            if name == config.data.split_key
            else infer_column(name, values)
            for name, values in columns.items()
        ]
        found["features"] = {
            each.column: {"kind": each.kind, **({"format": each.format} if each.format else {})}
            for each in chosen
            if each.kind
        }
        decisions += chosen
        if not found["features"]:
            raise UserError(
                f"'{config.data.train}' has no column to predict '{config.target}' from: "
                + "; ".join(f"{each.column}: {each.why}" for each in chosen)
            )
    if decisions:
        _show(decisions)
    kinds = {
        each["kind"] if isinstance(each, dict) else each.kind
        for each in (found.get("features") or config.features).values()
    }
    num_known = len(looked_at[config.target])
    given = config.model_dump(mode="json", exclude_unset=True)
    suited = suited_defaults(
        kinds,
        num_known,
        is_large=source.size_bytes > LARGE_BYTES,
        train_on_valid=config.data.train_on_valid,
    )
    if config.checkpoint.metric is not None:  # which chooses an epoch of one run
        suited.get("stop", {}).pop("folds", None)
    return validate_config(fill_missing(given, {**suited, **found}))


def _is_settled(config: Config) -> bool:
    """Whether nothing that `suited` would say is left open."""
    kinds = {feature.kind for feature in config.features.values()}
    given = config.model_dump(mode="json", exclude_unset=True)
    suited = suited_defaults(kinds, LOOKED_AT, train_on_valid=config.data.train_on_valid)
    return fill_missing(given, suited) == given


def suited_defaults(
    kinds: set[str], num_looked_at: int, *, is_large: bool = False, train_on_valid: bool = False
) -> dict[str, Any]:
    """What of a run suits columns of these kinds; the defaults are for images.

    The epoch is chosen by the validation loss, where records are few by that of folds, and training
    ends when it no longer falls.
    """
    if "image" in kinds or any(":" in kind for kind in kinds):
        return {}
    small = num_looked_at < SMALL
    optim: dict[str, Any] = {"name": "adamw", "label_smoothing": 0.0, "batch_size": 64}
    net: dict[str, Any] = {}
    if "text" in kinds:
        optim |= {"lr": 0.005, "epochs": 40 if small else 6}
        patience = 16 if small else 3
    else:
        optim |= {"lr": 0.002, "weight_decay": 0.1, "schedule": "constant", "epochs": 200}
        net = {"members": 8, "dropout": 0.2}
        if not small:
            optim |= {"batch_size": 256, "epochs": 100}
        patience = 16
        if is_large:  # an epoch has steps enough for several of a small table's
            optim |= {"batch_size": 1024, "epochs": 50}
            patience = 4
    chosen: dict[str, Any] = {
        "stop": {"metric": LOSS, "patience": patience, "folds": FOLDS if small else 0}
    }
    if train_on_valid:  # which leaves no records to choose by
        optim |= {"epochs": min(optim["epochs"], 20), "schedule": "linear"}
        chosen = {"checkpoint": {"metric": LAST}}
    # In bf16 a number would lose its last digits.
    return {"optim": optim, "net": net, "precision": "fp32", **chosen}


def infer_task_type(values: Sequence[Any] | np.ndarray) -> tuple[str, str]:
    """Return the task type of a target, and why."""
    known = [value for value in values if not is_missing(value)]
    if not known:
        raise UserError("the target is missing in every record that was looked at.")
    if isinstance(known[0], list | tuple | np.ndarray):
        return "multilabel", "a list in each record"
    names = {to_text(value) if not isinstance(value, bytes) else repr(value) for value in known}
    numbers = _read_all(Number("target"), known)
    if numbers is None or _all_words(known, TRUE | FALSE) or len(names) == 2:
        if len(names) > MAX_NAMED_CLASSES:
            raise UserError(
                f"the target has {len(names)} different values that are no numbers, such as "
                f"{shorten(known[0])}; give --task_type classification if each is a class, or "
                "another --target."
            )
        return "classification", f"{len(names)} different values"
    whole = bool(np.all(numbers == np.round(numbers)))
    if whole and len(names) <= min(MAX_CLASSES, max(2, len(known) // 10)):
        return "classification", f"{len(names)} different whole numbers"
    return "regression", f"numbers from {numbers.min():g} to {numbers.max():g}"


def infer_column(column: str, values: Sequence[Any] | np.ndarray) -> InferredColumn:
    """Say what a column is by its values."""
    known = [value for value in values if not is_missing(value)]
    if INDEX_NAMES.fullmatch(column):
        return InferredColumn(column, None, "an index of pandas")
    if not known:
        return InferredColumn(column, None, f"missing in all of {len(values)} records")
    first = known[0]
    if isinstance(first, dict) and "bytes" in first:
        return InferredColumn(column, "image", "image files")
    if isinstance(first, bytes) and first.startswith(IMAGE_SIGNATURES):
        return InferredColumn(column, "image", "image files")
    if isinstance(first, dict | list | tuple | np.ndarray | bytes):
        return InferredColumn(column, None, f"{type(first).__name__} values are of no known kind")
    distinct = len({to_text(value) if not isinstance(value, str) else value for value in known})
    if distinct == 1:
        return InferredColumn(column, None, f"the same in all of {len(values)} records")
    if isinstance(first, bool | np.bool_) or _all_words(known, TRUE | FALSE):
        return InferredColumn(column, "boolean", "true and false")
    numbers = None if _looks_padded(known) else _read_all(Number(column), known)
    if numbers is not None:
        if distinct == len(known) > 20 and _counts_up(numbers):
            return InferredColumn(column, None, "counts the records")
        return InferredColumn(column, "number", f"{numbers.min():g} to {numbers.max():g}")
    for form in (None, *DATE_FORMATS):
        if _read_all(Date(column, form), known) is not None:
            return InferredColumn(column, "date", form or "ISO 8601", form)
    words = float(np.mean([len(to_text(value).split()) for value in known]))
    if words >= TEXT_WORDS and distinct > 0.1 * len(known):
        return InferredColumn(column, "text", f"{words:.0f} words on average")
    if distinct > max(MAX_DISTINCT_SHARE * len(known), 20):
        if words > 1.5:
            return InferredColumn(column, "text", f"{distinct} different texts")
        return InferredColumn(column, None, f"{distinct} different names of {len(known)}")
    return InferredColumn(column, "category", f"{distinct} different names")


def _read_all(kind: Number | Boolean | Date, known: Sequence[Any]) -> np.ndarray | None:
    try:
        values_N = kind.read(known)
    except InvalidRecord:
        return None
    finite_N = values_N[np.isfinite(values_N)]
    return finite_N if len(finite_N) else None


def _all_words(known: Sequence[Any], words: set[str]) -> bool:
    """Whether all are words of a set, and not all of them digits."""
    found = {to_text(value).strip().lower() for value in known if not isinstance(value, bytes)}
    return found <= words and not found <= {"0", "1"}


def _looks_padded(known: Sequence[Any]) -> bool:
    """Whether digits begin with a 0 that a number would lose, as postal codes do."""
    return any(isinstance(value, str) and re.fullmatch(r"0[0-9]+", value) for value in known)


def _counts_up(numbers_N: np.ndarray) -> bool:
    return bool(np.all(np.diff(numbers_N) == 1))


def _show(decisions: Sequence[InferredColumn]) -> None:
    table = Table("column", "taken as", "because", box=None, header_style="bold")
    for each in decisions:
        table.add_row(each.column, each.kind or "left out", each.why)
    Console(stderr=True).print(table)
