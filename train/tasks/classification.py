"""Targets that are one of several classes. Shapes: N records, K classes."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from train import metrics
from train.metrics import Metric
from train.tasks.targets import GO_ON, NamedTarget, label_name
from train.values.names import NameForm, find_form, to_name
from train.values.records import Arrays, InvalidRecord, is_missing, with_row

# Separates the labels of a record.
SEPARATOR = "|"

# Types of labels whose names are cached.
HASHED = (str, int, bool, np.int64, np.int32)


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Return probabilities, float32 [N, K], whose rows sum to 1, for logits, float [N, K]."""
    exponents = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True), dtype=np.float32)
    return exponents / exponents.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class ClassTarget(NamedTarget):
    """Target that is one of K classes.

    Labels may be strings, numbers or booleans; the label of a prediction is a string.
    counts: number of training records of each class.
    """

    kind: ClassVar[str] = "classification"
    loss: ClassVar[str] = "cross_entropy"

    @property
    def rarest(self) -> int:
        """Index of the class with the fewest training records; the last of equally rare ones."""
        counts = self.counts or (1,) * len(self.classes)
        return min(range(len(counts)), key=lambda index: (counts[index], -index))

    @property
    def is_rare(self) -> bool:
        """Whether a class has less than a fifth of an even share; with two classes, under 10 %."""
        return bool(self.counts) and min(self.counts) * len(self.counts) < sum(self.counts) / 5

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The metrics that `metrics` returns, the main one first.

        The main metric is the accuracy, or the average precision if a class is rare, because all
        models have nearly the same accuracy if one class has nearly all records. With a decision
        rule of costs, it is the mean cost.
        """
        names = ["accuracy", "balanced_accuracy", "f1"]
        if len(self.classes) == 2:
            names += ["auc", "average_precision"]
        elif self.is_rare:
            names += ["average_precision"]
        if self.is_rare:
            names = ["average_precision", *(each for each in names if each != "average_precision")]
        found = [Metric(name, "higher") for name in names]
        cost = [Metric("cost", "lower")] if self.costs else []
        return (*cost, *found, Metric("loss", "lower"), Metric("calibration_error", "lower"))

    def fit(self, values: Iterable[Any]) -> Self:
        """Return the target with the classes of training values.

        Classes are in numeric order if all are integers, otherwise in alphabetical order. Raises
        InvalidRecord if there are fewer than two classes or a value is missing.
        """
        written = Counter(self._labels(values, "text"))
        form = find_form(written)
        counts: Counter[str] = Counter()
        for label, count in written.items():
            counts[to_name(label, form)] += count
        # In numeric order, class 10 does not come before class 2.
        by_number = all(re.fullmatch(r"-?[0-9]+", label) for label in counts)
        classes = tuple(sorted(counts, key=int if by_number else None))
        if len(classes) < 2:
            raise InvalidRecord(
                f"column '{self.column}' has only the value {list(classes)}; "
                "expected at least two classes."
            )
        return replace(self, classes=classes, counts=tuple(counts[name] for name in classes))

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return class indices, int64 [N], of N labels.

        Raises InvalidRecord for a missing label and for a class that `fit` did not see.
        """
        codes = {label: index for index, label in enumerate(self.classes)}
        indices = np.zeros(len(values), np.int64)
        for row, label in enumerate(self._labels(values, find_form(self.classes))):
            if label not in codes:
                raise InvalidRecord(
                    f"column '{self.column}' is '{label}', a class that the training records do "
                    "not have (it may be too rare to be in every split); known are "
                    f"{', '.join(self.classes[:20])}{'…' * (len(self.classes) > 20)}; {GO_ON}.",
                    row,
                )
            indices[row] = codes[label]
        return indices

    def decode(self, outputs: Arrays) -> Arrays:
        """Return {"label": object [N] of str, "probabilities": float32 [N, K]}.

        outputs: {"logits": float [N, K]}.
        """
        probabilities_NK = self.probabilities(outputs)
        labels_N = np.array(self.classes, dtype=object)[self.choose(probabilities_NK)]
        return {"label": labels_N, "probabilities": probabilities_NK}

    def probabilities(self, outputs: Arrays) -> np.ndarray:
        """Return probabilities, float32 [N, K], calibrated by the temperature.

        outputs: {"logits": float [N, K]}.
        """
        return softmax(outputs["logits"] / np.float32(self.temperature))

    def choose(self, probabilities_NK: np.ndarray) -> np.ndarray:
        """Return the index of the predicted class of each record, int64 [N].

        It is the most probable class, unless the decision rule has a threshold or costs: with a
        threshold it is the rarer of two classes if its probability reaches the threshold; with
        costs it is the class with the least expected cost.
        probabilities_NK: float32 [N, K].
        """
        if self.thresholds:
            rarer = self.rarest
            is_rarer_N = probabilities_NK[:, rarer] >= np.float32(self.thresholds[0])
            return np.where(is_rarer_N, rarer, 1 - rarer)
        if self.costs:
            return np.argmin(probabilities_NK @ np.array(self.costs, np.float32), axis=1)
        return np.argmax(probabilities_NK, axis=1)

    def metrics(self, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
        """Return all metrics in `known_metrics` by name.

        accuracy, balanced_accuracy and f1 judge the predicted classes. f1, auc and
        average_precision are those of the rarer of two classes; with more classes f1 and
        average_precision are means over the classes. loss is the log loss in nats;
        calibration_error is that of the most probable class; cost is the mean cost of a record.
        outputs: {"logits": float [N, K]}. targets: class indices, int [N].
        """
        return {each.name: self.metric(each.name, outputs, targets) for each in self.known_metrics}

    def metric(self, name: str, outputs: Arrays, targets: np.ndarray) -> float:
        """Return the metric `name`; for arguments and definitions see `metrics`.

        outputs: {"logits": float [N, K]}. targets: class indices, int [N]. Raises ValueError for an
        unknown name.
        """
        probabilities_NK = self.probabilities(outputs)
        chosen_N = self.choose(probabilities_NK)
        classes = [self.rarest] if len(self.classes) == 2 else range(len(self.classes))
        match name:
            case "accuracy":
                return float(np.mean(chosen_N == targets))
            case "balanced_accuracy":
                return metrics.balanced_accuracy(targets, chosen_N)
            case "f1":
                return _mean(metrics.f1_score(targets == k, chosen_N == k) for k in classes)
            case "loss":
                return metrics.log_loss(probabilities_NK[np.arange(len(targets)), targets])
            case "calibration_error":
                right_N = probabilities_NK.argmax(axis=1) == targets
                return metrics.calibration_error(probabilities_NK.max(axis=1), right_N)
            case "auc":
                return metrics.roc_auc(targets == self.rarest, probabilities_NK[:, self.rarest])
            case "average_precision":
                return _mean(
                    metrics.average_precision(targets == k, probabilities_NK[:, k]) for k in classes
                )
            case "cost":
                return float(np.mean(np.array(self.costs)[targets, chosen_N]))
        raise ValueError(f"unknown metric '{name}'")

    def _labels(self, values: Iterable[Any], form: NameForm) -> Iterable[str]:
        # Labels repeat, so their names are cached: for each type apart, because 1 == True.
        known: dict[type, dict[Any, str]] = {kind: {} for kind in HASHED}
        for row, value in enumerate(values):
            of_kind = known.get(type(value))
            if of_kind is not None and value in of_kind:
                yield of_kind[value]
                continue
            if is_missing(value):
                raise InvalidRecord(
                    f"column '{self.column}' is missing; expected a class label. {GO_ON}.", row
                )
            with with_row(row):
                label = label_name(self.column, value, form)
            if of_kind is not None:
                of_kind[value] = label
            yield label


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
