"""The task of an imported model: features that are not changed, and the target's classes.

Shapes: N records, K classes.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.errors import UserError
from train.config import Config
from train.data.schema.target_type import infer_task_type
from train.importing.sample import UNKNOWN, Sample, plain_number
from train.tasks import (
    Categories,
    ClassTarget,
    Columns,
    Encoder,
    Features,
    InvalidRecord,
    Numbers,
    Task,
    Texts,
    ValueTarget,
)
from train.tasks.classification import softmax
from train.tasks.columns.categorical import MISSING, UNSEEN
from train.tasks.columns.scalars import Boolean
from train.values.names import find_form, to_name
from train.values.records import is_missing

MOST_SHOWN = 10


@dataclass(frozen=True)
class ImportedTask:
    """The task of an imported model, and its own predictions for the sample.

    texts: for each category, the text of each code. kind: what the model's output holds, as in
    `graph.adapt_graph`. labels_N, probabilities_NK: int64 [N] and float64 [N, K], the model's class
    indices and probabilities; None for numbers.
    """

    task: Task
    texts: dict[str, list[str]]
    kind: str
    labels_N: np.ndarray | None = None
    probabilities_NK: np.ndarray | None = None


def define_imported_task(
    config: Config,
    columns: Columns,
    sample: Sample,
    facts: Mapping[str, Any],
    original: Mapping[str, np.ndarray],
    classes: Sequence[str],
    tokenizer: str = "",
) -> ImportedTask:
    """Return the task of a model.

    facts, original: what `isolated.run_isolated` found, and its outputs, [N, …] by name. classes:
    their names in the model's order, if given. tokenizer: JSON of that of a text model. Raises
    UserError if the sample's target does not fit the model.
    """
    texts: dict[str, list[str]] = {}
    if facts["layout"] == "tokens":
        features = _text_features(columns, facts, tokenizer)
    else:
        features, texts = _features(columns, sample, facts)
    values_N = original["values"]
    # Encoding the sample reports missing ones, or drops them.
    answers = [value for value in columns[config.target] if not is_missing(value)]
    task_type = facts["task_type"] or config.task_type or infer_task_type(answers)[0]
    if task_type == ValueTarget.kind:
        if values_N.ndim == 2 and values_N.shape[1] != 1:
            raise UserError(
                f"the model has {values_N.shape[1]} outputs for a record, and '{config.target}' is "
                "a number."
            )
        try:
            value = ValueTarget(config.target).fit(answers)
        except InvalidRecord as error:
            raise UserError(f"the sample does not fit the model: {error}") from error
        return ImportedTask(Task(features, value), texts, "values")
    wide = values_N.ndim == 2 and values_N.shape[1] > 1
    count = values_N.shape[1] if wide else 2
    target = _class_target(config, answers, count, facts.get("classes"), classes)
    kind = "probabilities" if facts["outputs"] == "probabilities" else "scores"
    if not wide:
        kind = {"scores": "score", "probabilities": "probability"}[kind]
        values_N = values_N.reshape(-1)
    if kind == "probability":
        probabilities_NK = np.stack([1 - values_N, values_N], axis=1)
    elif kind == "probabilities":
        probabilities_NK = values_N / values_N.sum(axis=1, keepdims=True)
    elif kind == "score":
        probabilities_NK = softmax(np.stack([0 * values_N, values_N], axis=1)).astype(np.float64)
    else:
        probabilities_NK = softmax(values_N).astype(np.float64)
    if facts["outputs"] == "scores":
        print(
            "warning: the model has scores instead of probabilities; the probabilities of its "
            "predictions are their softmax, which is not calibrated",
            file=sys.stderr,
        )
    labels_N = probabilities_NK.argmax(axis=1)
    if "labels" in original:
        labels_N = original["labels"]
    elif "names" in original:
        labels_N = _codes(target, original["names"], labels_N)
    return ImportedTask(Task(features, target), texts, kind, labels_N, probabilities_NK)


def _features(
    columns: Columns, sample: Sample, facts: Mapping[str, Any]
) -> tuple[Features, dict[str, list[str]]]:
    """Return encoders that leave numbers as they are, and the texts of each category's codes."""
    categories = set(facts["categories"])
    numbers = [
        Boolean(name) if name in sample.booleans else plain_number(name)
        for name in facts["columns"]
        if name not in categories
    ]
    encoders: list[Encoder] = []
    if numbers:
        missing = tuple(bool(np.isnan(sample.numbers[each.column]).any()) for each in numbers)
        count = len(numbers)
        unscaled = (0.0,) * count, (1.0,) * count
        required = tuple(n.column for n in numbers if n.column in facts["limits"]["missing"])
        encoders.append(Numbers(tuple(numbers), *unscaled, missing, raw=True, required=required))
    texts: dict[str, list[str]] = {}
    if categories:
        names = [name for name in facts["columns"] if name in categories]
        fitted = Categories(tuple(names)).fit({name: columns[name] for name in names})
        all_names = []
        for name, found in zip(names, fitted.names_C, strict=True):
            known, of_sample = facts["known"].get(name, []), sample.texts[name]
            given = [*known, *dict.fromkeys(text for text in of_sample if text is not None)]
            form = find_form(given)
            # A name may be written in several ways; the model's own comes first.
            written: dict[str, str] = {}
            for text in given:
                written.setdefault(to_name(text, form), text)
            order = [*(each for each in found if each in written)]
            order += [each for each in written if each not in set(order)]
            all_names.append(tuple(order))
            texts[name] = [UNKNOWN, "", *(written[each] for each in order)]
        limits = facts["limits"]
        refused = tuple(
            (*[UNSEEN] * (name in limits["unknown"]), *[MISSING] * (name in limits["missing"]))
            for name in names
        )
        encoders.append(replace(fitted, names_C=tuple(all_names), refused_C=refused))
    return Features(tuple(encoders)), texts


def _text_features(columns: Columns, facts: Mapping[str, Any], tokenizer: str) -> Features:
    """Return the encoder of a text column with the model's own tokenizer."""
    texts = Texts(tuple(facts["columns"]), int(facts["max_tokens"]), tokenizer=tokenizer)
    return Features((texts.fit({name: columns[name] for name in texts.columns}),))


def _class_target(
    config: Config,
    answers: Any,
    count: int,
    known: Sequence[Any] | None,
    given: Sequence[str],
) -> ClassTarget:
    """Return the target with the model's classes in its order, counted in the sample."""
    try:
        of_sample = ClassTarget(config.target).fit(answers)
    except InvalidRecord as error:
        raise UserError(f"the sample does not fit the model: {error}") from error
    if given:
        names = tuple(given)
    elif known is not None:
        form = find_form(known)
        names = tuple(to_name(each, form) for each in known)
        unknown = set(of_sample.classes) - set(names)
        # Libraries of trees know classes by their number only.
        if unknown and list(known) == list(range(count)):
            known = None
    if known is None and not given:
        names = of_sample.classes
        if names != tuple(map(str, range(count))) and len(names) == count:
            pairs = ", ".join(
                f"{place} is '{name}'" for place, name in enumerate(names[:MOST_SHOWN])
            )
            print(
                f"the model numbers its classes; in the order of their names, {pairs}. If that is "
                "wrong, give --classes",
                file=sys.stderr,
            )
    if len(names) != count:
        raise UserError(
            f"the model has {count} classes, and {len(names)} are known: {', '.join(names)}; give "
            "their names in the model's order with --classes."
        )
    if strange := [name for name in of_sample.classes if name not in names]:
        raise UserError(
            f"the sample has the class '{strange[0]}', which the model does not know; it has "
            f"{', '.join(names[:MOST_SHOWN])}."
        )
    counts = Counter(dict(zip(of_sample.classes, of_sample.counts, strict=True)))
    return ClassTarget(config.target, names, tuple(counts[name] for name in names))


def _codes(target: ClassTarget, names_N: np.ndarray, probable_N: np.ndarray) -> np.ndarray:
    """Return the class index of each label of the model, int64 [N].

    If its labels are not the names of the classes, the most probable classes are taken.
    """
    codes = {name: index for index, name in enumerate(target.classes)}
    form = find_form(target.classes)
    found = [codes.get(to_name(str(name), form)) for name in names_N]
    if None in found:
        return probable_N
    return np.array(found, np.int64)
