"""Feedback, the true labels of answered requests, and live metrics from it.

Predictions of the latest requests are kept in memory; the request log keeps them longer.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import BadRequest, abbreviated
from train.stats import Z_95, wilson_interval
from train.tasks import ClassTarget, LabelsTarget, Target
from train.values.label_lists import SEPARATOR

# Maximum requests in memory, and maximum rows of all of them, about 200 bytes per row.
MAX_REQUESTS, MAX_ROWS = 100_000, 500_000

Prediction = str | float


@dataclass
class AnsweredRequest:
    """A request: the predictions of each version for its rows, and the rows' labels if known.

    compared: whether `take_losses` has returned the request's losses.
    """

    predictions: dict[str, Sequence[Prediction | None]]
    truths: list[Any] | None = None
    compared: bool = False

    @property
    def num_rows(self) -> int:
        """Rows in memory, counted once for each version."""
        return sum(map(len, self.predictions.values()))


@dataclass(frozen=True)
class LiveMetric:
    """A metric of recent feedback with its 95 % interval. count: rows."""

    count: int
    metric: str
    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON."""
        return dict(vars(self))


class FeedbackStore:
    """Predictions and labels of the latest requests. Belongs to one event loop."""

    def __init__(self, target: Target, most: int = MAX_REQUESTS, most_rows: int = MAX_ROWS) -> None:
        """most, most_rows: maximum requests and rows; beyond it the oldest are dropped."""
        self._target = target
        self._most, self._most_rows, self._rows = most, most_rows, 0
        self._requests: OrderedDict[str, AnsweredRequest] = OrderedDict()
        # Live metrics by version, cached until another label arrives.
        self._live: dict[str, LiveMetric | None] = {}
        # Requests with labels and the predictions of two versions, in the order in which they
        # became so.
        self._comparable: dict[str, None] = {}

    def predicted(
        self, request_id: str, version: str, predictions: Sequence[Prediction | None]
    ) -> None:
        """Store the predictions of a request; None for rows whose prediction is not known.

        If an id is used for several requests, the latest request replaces the earlier ones.
        """
        known = self._requests.pop(request_id, None)
        self._rows -= known.num_rows if known is not None else 0
        if known is None or version in known.predictions:
            known = AnsweredRequest({})
        known.predictions[version] = predictions
        self._requests[request_id] = known
        self._rows += known.num_rows
        self._note_comparable(request_id)
        while len(self._requests) > self._most or self._rows > self._most_rows:
            self._rows -= self._requests.popitem(last=False)[1].num_rows

    def knows(self, request_id: str) -> bool:
        """Return whether a request is in memory."""
        return request_id in self._requests

    def find(self, request_id: str) -> str | None:
        """Return an id with its owner, for any API key; None if it is not in memory.

        Raises BadRequest if several keys used the id.
        """
        found = [each for each in self._requests if each.partition("/")[2] == request_id]
        if len(found) > 1:
            raise BadRequest(
                f"several API keys used the id '{request_id[:100]}'; name one of them in 'client'."
            )
        return found[0] if found else None

    def give(self, request_id: str, truths: Sequence[Any]) -> bool:
        """Store the labels of a request in memory; they replace earlier ones.

        Returns whether the labels have changed. Raises BadRequest if the number of labels is not
        that of the records, or a label does not fit the target.
        """
        request = self._requests[request_id]
        count = len(next(iter(request.predictions.values())))
        if len(truths) != count:
            raise BadRequest(
                f"'truth' has {len(truths)} values; request '{request_id[:100]}' had {count} "
                "records. Send one value per record."
            )
        before, request.truths = request.truths, [self.truth(value) for value in truths]
        self._live.clear()
        self._note_comparable(request_id)
        return before != request.truths

    def _note_comparable(self, request_id: str) -> None:
        request = self._requests[request_id]
        if request.truths is not None and len(request.predictions) > 1 and not request.compared:
            self._comparable[request_id] = None

    def truth(self, value: Any) -> Prediction:
        """Return a label in the form of predictions. Raises BadRequest if it does not fit."""
        target = self._target
        if isinstance(target, LabelsTarget):
            names = value.split(SEPARATOR) if isinstance(value, str) else value
            if not isinstance(names, list):
                names = [value]
            return SEPARATOR.join(
                sorted(self._class(name, target.classes) for name in names if name)
            )
        if isinstance(target, ClassTarget):
            return self._class(value, target.classes)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise BadRequest(f"'truth' has {abbreviated(value, 100)!r}; expected a number.")
        return float(value)

    def _class(self, value: Any, classes: tuple[str, ...]) -> str:
        is_name = isinstance(value, str | int) and not isinstance(value, bool)
        if not is_name or str(value) not in classes:
            known = ", ".join(classes[:20]) + "…" * (len(classes) > 20)
            given = abbreviated(value, 100)
            raise BadRequest(f"'truth' has {given!r}; this model's classes are {known}.")
        return str(value)

    def live(self, version: str) -> LiveMetric | None:
        """Return a version's metric over all labelled requests in memory; None without any."""
        if version not in self._live:
            self._live[version] = self._figure(version)
        return self._live[version]

    def _figure(self, version: str) -> LiveMetric | None:
        losses = [
            loss
            for request in self._requests.values()
            if request.truths is not None and version in request.predictions
            for loss in self._losses(request, version)
            if loss is not None
        ]
        if not losses:
            return None
        if isinstance(self._target, ClassTarget | LabelsTarget):
            correct = len(losses) - int(sum(losses))
            low, high = wilson_interval(correct, len(losses))
            return LiveMetric(len(losses), "accuracy", correct / len(losses), low, high)
        return _rmse(np.array(losses))

    def take_losses(self, one: str, other: str) -> list[tuple[float, float]]:
        """Return the mean losses of two versions for each request that can newly be compared.

        A request can be compared once it has labels and predictions of both versions. Each is
        returned once, in this order; later corrections of its labels are ignored. The loss of a row
        is 1 for a wrong class, or the squared error; the mean is over the rows that both versions
        answered.
        """
        losses = []
        for request_id in self._comparable:
            request = self._requests.get(request_id)
            if request is None or not {one, other} <= request.predictions.keys():
                continue
            request.compared = True
            rows = zip(self._losses(request, one), self._losses(request, other), strict=True)
            pairs = [(before, after) for before, after in rows if None not in (before, after)]
            if pairs:
                losses.append(tuple(np.array(pairs, float).mean(axis=0).tolist()))
        self._comparable.clear()
        return losses

    def _losses(self, request: AnsweredRequest, version: str) -> list[float | None]:
        assert request.truths is not None
        return [
            None if predicted is None else self._loss(predicted, truth)
            for predicted, truth in zip(request.predictions[version], request.truths, strict=True)
        ]

    def _loss(self, predicted: Prediction, truth: Prediction) -> float:
        if isinstance(self._target, ClassTarget | LabelsTarget):
            return float(predicted != truth)
        return (float(predicted) - float(truth)) ** 2


def predictions_of(answers: Mapping[str, np.ndarray]) -> list[Prediction]:
    """Return predictions in the form that is compared with feedback, one per record.

    answers: "label" [N], whose joined labels are sorted, or "value" [N].
    """
    if "label" in answers:
        return [SEPARATOR.join(sorted(str(label).split(SEPARATOR))) for label in answers["label"]]
    return [float(value) for value in answers["value"]]


def _rmse(squares_N: np.ndarray) -> LiveMetric:
    mean = float(squares_N.mean())
    count = len(squares_N)
    half = Z_95 * float(squares_N.std(ddof=1)) / math.sqrt(count) if count > 1 else mean
    low, high = (math.sqrt(max(end, 0.0)) for end in (mean - half, mean + half))
    return LiveMetric(count, "rmse", math.sqrt(mean), low, high)
