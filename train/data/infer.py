"""Inference of the task: what each column is, and what of a run suits it, found by looking.

Only what the config leaves open is filled in.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.errors import UserError
from train.config import Config, validate
from train.data import origin, sources
from train.tasks import InvalidRecord
from train.tasks.images import IMAGE_SIGNATURES
from train.tasks.numbers import FALSE, TRUE, Boolean, Date, Number
from train.tasks.records import is_missing, shown, text

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


@dataclass(frozen=True)
class Decision:
    """What a column is, or None where it is left out, and why."""

    column: str
    kind: str | None
    why: str
    format: str | None = None


def complete(config: Config) -> Config:
    """Return the config with features, learn and what suits them filled in where left open.

    Of a run that begins from a bundle, that is what the bundle says, by its version.

    Raises UserError if the records do not allow it.
    """
    if config.init is not None:
        given = config.model_dump(mode="json", exclude_unset=True)
        given = {**given, "init": origin.pinned(config)}
        config = validate(_under(given, origin.options(config)))
    if config.task is not None and not config.features:
        raise UserError(
            f"task is '{config.task}', and features are not listed; a task of your own needs them."
        )
    if config.features and config.learn is not None and _is_settled(config):
        return config
    source = sources.find(config.data.train)
    looked_at = sources.head(source, LOOKED_AT, config.data.encoding)
    wanted = [config.target, *config.data.drop, *config.features]
    sources.check_columns(config.data.train, wanted, list(looked_at))
    found: dict[str, Any] = {}
    decisions = []
    if config.learn is None:
        learn, why = learned(looked_at[config.target])
        found["learn"] = learn
        decisions.append(Decision(config.target, f"target: {learn}", why))
    if not config.features:
        columns = {name: values for name, values in looked_at.items() if name != config.target}
        chosen = [
            Decision(name, None, "data.drop")
            if name in config.data.drop
            else Decision(name, None, "data.split_key")
            if name == config.data.split_key
            else decide(name, values)
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
    return validate(_under(given, {**suited(kinds, num_known), **found}))


def _is_settled(config: Config) -> bool:
    """Whether nothing that `suited` would say is left open."""
    kinds = {feature.kind for feature in config.features.values()}
    given = config.model_dump(mode="json", exclude_unset=True)
    return _under(given, suited(kinds, LOOKED_AT)) == given


def suited(kinds: set[str], num_looked_at: int) -> dict[str, Any]:
    """What of a run suits columns of these kinds; the defaults are for images."""
    if "image" in kinds or any(":" in kind for kind in kinds):
        return {}
    small = num_looked_at < SMALL
    optim: dict[str, Any] = {"name": "adamw", "label_smoothing": 0.0, "batch_size": 64}
    if "text" in kinds:
        optim |= {"lr": 0.005, "epochs": 40 if small else 6}
    else:
        optim |= {"lr": 0.002, "epochs": 40, "weight_decay": 0.01}
        if not small:
            optim["batch_size"] = 128
    # In bf16 a number would lose its last digits.
    return {"optim": optim, "precision": "fp32", "checkpoint": {"best": "last"}}


def learned(values: Sequence[Any] | np.ndarray) -> tuple[str, str]:
    """Return how a target is learned, and why."""
    known = [value for value in values if not is_missing(value)]
    if not known:
        raise UserError("the target is missing in every record that was looked at.")
    if isinstance(known[0], list | tuple | np.ndarray):
        return "labels", "a list in each record"
    names = {text(value) if not isinstance(value, bytes) else repr(value) for value in known}
    numbers = _read_all(Number("target"), known)
    if numbers is None or _all_words(known, TRUE | FALSE) or len(names) == 2:
        if len(names) > MAX_NAMED_CLASSES:
            raise UserError(
                f"the target has {len(names)} different values that are no numbers, such as "
                f"{shown(known[0])}; give --learn class if each is a class, or another --target."
            )
        return "class", f"{len(names)} different values"
    whole = bool(np.all(numbers == np.round(numbers)))
    if whole and len(names) <= min(MAX_CLASSES, max(2, len(known) // 10)):
        return "class", f"{len(names)} different whole numbers"
    return "value", f"numbers from {numbers.min():g} to {numbers.max():g}"


def decide(column: str, values: Sequence[Any] | np.ndarray) -> Decision:
    """Say what a column is by its values."""
    known = [value for value in values if not is_missing(value)]
    if INDEX_NAMES.fullmatch(column):
        return Decision(column, None, "an index of pandas")
    if not known:
        return Decision(column, None, f"missing in all of {len(values)} records")
    first = known[0]
    if isinstance(first, dict) and "bytes" in first:
        return Decision(column, "image", "image files")
    if isinstance(first, bytes) and first.startswith(IMAGE_SIGNATURES):
        return Decision(column, "image", "image files")
    if isinstance(first, dict | list | tuple | np.ndarray | bytes):
        return Decision(column, None, f"{type(first).__name__} values are of no known kind")
    distinct = len({text(value) if not isinstance(value, str) else value for value in known})
    if distinct == 1:
        return Decision(column, None, f"the same in all of {len(values)} records")
    if isinstance(first, bool | np.bool_) or _all_words(known, TRUE | FALSE):
        return Decision(column, "boolean", "true and false")
    numbers = None if _looks_padded(known) else _read_all(Number(column), known)
    if numbers is not None:
        if distinct == len(known) > 20 and _counts_up(numbers):
            return Decision(column, None, "counts the records")
        return Decision(column, "number", f"{numbers.min():g} to {numbers.max():g}")
    for form in (None, *DATE_FORMATS):
        if _read_all(Date(column, form), known) is not None:
            return Decision(column, "date", form or "ISO 8601", form)
    words = float(np.mean([len(text(value).split()) for value in known]))
    if words >= TEXT_WORDS and distinct > 0.1 * len(known):
        return Decision(column, "text", f"{words:.0f} words on average")
    if distinct > max(MAX_DISTINCT_SHARE * len(known), 20):
        if words > 1.5:
            return Decision(column, "text", f"{distinct} different texts")
        return Decision(column, None, f"{distinct} different names of {len(known)}")
    return Decision(column, "category", f"{distinct} different names")


def _read_all(kind: Number | Boolean | Date, known: Sequence[Any]) -> np.ndarray | None:
    try:
        values_N = kind.read(known)
    except InvalidRecord:
        return None
    finite_N = values_N[np.isfinite(values_N)]
    return finite_N if len(finite_N) else None


def _all_words(known: Sequence[Any], words: set[str]) -> bool:
    """Whether all are words of a set, and not all of them digits."""
    found = {text(value).strip().lower() for value in known if not isinstance(value, bytes)}
    return found <= words and not found <= {"0", "1"}


def _looks_padded(known: Sequence[Any]) -> bool:
    """Whether digits begin with a 0 that a number would lose, as postal codes do."""
    return any(isinstance(value, str) and re.fullmatch(r"0[0-9]+", value) for value in known)


def _counts_up(numbers_N: np.ndarray) -> bool:
    return bool(np.all(np.diff(numbers_N) == 1))


def _show(decisions: Sequence[Decision]) -> None:
    table = Table("column", "taken as", "because", box=None, header_style="bold")
    for each in decisions:
        table.add_row(each.column, each.kind or "left out", each.why)
    Console(stderr=True).print(table)


def _under(given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and what was found where nothing is."""
    merged = dict(given)
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _under(merged[key], value)
        else:
            merged.setdefault(key, value)
    return merged
