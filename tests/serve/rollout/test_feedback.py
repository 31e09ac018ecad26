"""Feedback: live metrics compared with references, and validation of what clients send."""

import numpy as np
import pytest

from serve.errors import BadRequest
from serve.protocol import feedback
from serve.rollout.feedback import FeedbackStore, predictions_of
from train.tasks import ClassTarget, LabelsTarget, ValueTarget

CLASSES = ClassTarget("kind", ("cat", "dog"))
LABELS = LabelsTarget("tags", ("new", "old", "red"))
VALUE = ValueTarget("price")


def test_accuracy_is_over_the_rows_with_a_known_truth():
    known = FeedbackStore(CLASSES)
    known.predicted("a", "3", ["cat", "dog"])
    known.predicted("b", "3", ["cat"])
    assert known.live("3") is None
    assert known.give("a", ["cat", "cat"])
    live = known.live("3")
    assert (live.count, live.metric, live.value) == (2, "accuracy", 0.5)
    known.give("b", ["cat"])
    assert known.live("3").value == pytest.approx(2 / 3)
    assert known.live("4") is None


def test_the_last_label_counts_and_repeating_it_changes_nothing():
    known = FeedbackStore(CLASSES)
    known.predicted("a", "3", ["cat"])
    assert known.give("a", ["dog"])
    assert not known.give("a", ["dog"])
    assert known.live("3").value == 0
    assert known.give("a", ["cat"])
    assert (known.live("3").count, known.live("3").value) == (1, 1)


def test_a_repeated_id_is_another_request():
    known = FeedbackStore(CLASSES)
    known.predicted("a", "3", ["cat"])
    known.give("a", ["cat"])
    known.predicted("a", "3", ["dog", "dog"])
    assert known.live("3") is None
    known.give("a", ["dog", "cat"])
    assert known.live("3").value == 0.5


def test_the_rmse_is_numpys_with_a_95_percent_interval():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        truths = generator.normal(size=400)
        predictions = truths + generator.normal(scale=0.3, size=400)
        known = FeedbackStore(VALUE)
        known.predicted("a", "3", predictions.tolist())
        known.give("a", truths.tolist())
        live = known.live("3")
        assert live.value == pytest.approx(np.sqrt(np.mean((predictions - truths) ** 2)))
        inside += live.low <= 0.3 <= live.high
    assert 0.92 <= inside / 300 <= 0.98


def test_labels_are_compared_as_sets():
    known = FeedbackStore(LABELS)
    labels = np.array(["red|new", ""], dtype=object)
    known.predicted("a", "3", predictions_of({"label": labels}))
    known.give("a", [["new", "red"], []])
    assert known.live("3").value == 1


@pytest.mark.parametrize(
    ("target", "truths", "word"),
    [
        (CLASSES, ["cow"], "classes are cat, dog"),
        (CLASSES, [True], "classes are"),
        (CLASSES, ["cat", "dog"], "has 2 values; request 'a' had 1"),
        (CLASSES, [["cat"]], "classes are"),
        (VALUE, ["many"], "expected a number"),
        (VALUE, [float("nan")], "expected a number"),
        (VALUE, [None], "expected a number"),
        (LABELS, [["new", "blue"]], "classes are"),
    ],
)
def test_an_invalid_truth_is_refused_and_nothing_is_kept(target, truths, word):
    known = FeedbackStore(target)
    known.predicted("a", "3", [1.0 if target is VALUE else "cat"])
    with pytest.raises(BadRequest, match=word):
        known.give("a", truths)
    assert known.live("3") is None


def test_rows_without_a_stored_prediction_are_left_out():
    known = FeedbackStore(CLASSES)
    known.predicted("a", "3", ["cat", None, "dog"])
    known.give("a", ["cat", "cat", "cat"])
    assert (known.live("3").count, known.live("3").value) == (2, 0.5)


def test_the_oldest_requests_are_dropped():
    known = FeedbackStore(CLASSES, most=2)
    for name in "abc":
        known.predicted(name, "3", ["cat"])
    assert [known.knows(name) for name in "abc"] == [False, True, True]


def test_a_request_is_compared_once_on_rows_of_both_versions():
    known = FeedbackStore(CLASSES)
    known.predicted("a", "3", ["cat", "cat", None])
    known.predicted("a", "4", ["dog", "cat", "cat"])
    known.predicted("b", "3", ["cat"])
    for name, truths in (("b", ["cat"]), ("a", ["dog", "cat", "cat"])):
        known.give(name, truths)
    assert known.take_losses("3", "4") == [(0.5, 0)]
    # The other version's prediction arrives after the label, and a label is corrected.
    known.predicted("b", "4", ["dog"])
    known.give("a", ["cat", "cat", "cat"])
    assert known.take_losses("3", "4") == [(0, 1)]
    assert known.take_losses("3", "4") == []


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"id": "a"}', b'{"id": 1, "truth": []}', b'{"id": "a", "truth": "cat"}']
)
def test_an_invalid_body_is_refused_with_the_expected_form(body):
    with pytest.raises(BadRequest, match=r'expected \{"id"'):
        feedback.decode(body, 1024)


def test_a_truth_with_markup_is_plain_text():
    known = FeedbackStore(ClassTarget("kind", ("<b>", "x")))
    known.predicted("a", "3", ["<b>"])
    known.give("a", ["<b>"])
    assert known.live("3").value == 1
