"""Metrics against scikit-learn, and their directions. Shapes: N records, K classes."""

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics

from train.metrics import LAST_EPOCH, Metric, best_epoch, calibration_error, quantile_loss
from train.tasks import ClassTarget, Features, LabelsTarget, Task, ValueTarget


def task_of(target):
    return Task(Features(()), target)


def draw(num_classes, shares=None, count=400, seed=0):
    """Return a fitted target, logits [N, K] better than chance, and the true classes [N]."""
    rng = np.random.default_rng(seed)
    truths_N = rng.choice(num_classes, count, p=shares)
    truths_N[:num_classes] = range(num_classes)
    logits_NK = rng.normal(size=(count, num_classes)) + 1.5 * np.eye(num_classes)[truths_N]
    names = np.array(list("abcdefgh"))
    return ClassTarget("y").fit(names[truths_N]), {"logits": logits_NK}, truths_N


def test_metrics_of_two_classes_match_scikit_learn():
    target, outputs, truths_N = draw(2, [0.94, 0.06])
    found = target.metrics(outputs, truths_N)
    probabilities_N = target.probabilities(outputs)[:, 1]
    chosen_N = probabilities_N > 0.5
    confidence_N = np.maximum(probabilities_N, 1 - probabilities_N)
    assert found == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(truths_N, chosen_N)),
        "balanced_accuracy": pytest.approx(
            sklearn.metrics.balanced_accuracy_score(truths_N, chosen_N)
        ),
        "f1": pytest.approx(sklearn.metrics.f1_score(truths_N, chosen_N)),
        "auc": pytest.approx(sklearn.metrics.roc_auc_score(truths_N, probabilities_N)),
        "average_precision": pytest.approx(
            sklearn.metrics.average_precision_score(truths_N, probabilities_N)
        ),
        "loss": pytest.approx(
            sklearn.metrics.log_loss(truths_N, probabilities_N.astype(float)), rel=1e-6
        ),
        "calibration_error": pytest.approx(calibration_error(confidence_N, chosen_N == truths_N)),
    }


def test_metrics_of_several_classes_are_means_over_them():
    target, outputs, truths_N = draw(4, [0.4, 0.35, 0.22, 0.03])
    found = target.metrics(outputs, truths_N)
    chosen_N = outputs["logits"].argmax(axis=1)
    precision = sklearn.metrics.average_precision_score(
        np.eye(4)[truths_N], target.probabilities(outputs)
    )
    assert found["average_precision"] == pytest.approx(precision)
    assert found["f1"] == pytest.approx(
        sklearn.metrics.f1_score(truths_N, chosen_N, average="macro")
    )
    assert found["balanced_accuracy"] == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(truths_N, chosen_N)
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_the_rarer_class_is_the_positive_class(swapped):
    """The order of the names does not matter."""
    names = ["x", "y"] if swapped else ["y", "x"]
    values = [names[0]] * 95 + [names[1]] * 5
    target = ClassTarget("t").fit(values)
    assert target.classes[target.rarest] == names[1]
    logits = np.zeros((100, 2), np.float32)
    logits[95:, target.rarest] = 1.0
    found = target.metrics({"logits": logits}, target.encode(values))
    assert found["average_precision"] == found["auc"] == 1.0


@pytest.mark.parametrize(
    ("counts", "metric"),
    [
        ((50, 50), "accuracy"),
        ((90, 10), "accuracy"),
        ((91, 9), "average_precision"),
        ((9, 91), "average_precision"),
        ((100,) * 10, "accuracy"),
        ((300, 300, 300, 20), "average_precision"),
    ],
)
def test_average_precision_is_the_metric_if_a_class_is_rare(counts, metric):
    classes = tuple("abcdefghij"[: len(counts)])
    task = task_of(ClassTarget("y", classes, counts))
    assert task.metric == metric
    assert task.find_metric() == Metric(f"valid_{metric}", "higher")


def test_the_calibration_error_matches_its_definition():
    confidence_N = np.array([0.55, 0.58, 0.91, 0.95, 1.0])
    right_N = np.array([True, False, True, True, False])
    # With 15 bins, bin 8 holds two of the records, bin 13 one and bin 14 two.
    expected = (abs(1.13 - 1) + abs(0.91 - 1) + abs(1.95 - 1)) / 5
    assert calibration_error(confidence_N, right_N) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    confidence_N = rng.uniform(0.5, 1, 200_000)
    assert calibration_error(confidence_N, rng.random(200_000) < confidence_N) < 0.01


def test_nan_outputs_give_nan_metrics():
    """No error is raised, so that the run can end with its own, more helpful message."""
    target, outputs, truths_N = draw(2)
    outputs["logits"][3] = np.nan
    found = target.metrics(outputs, truths_N)
    assert all(np.isnan(found[name]) for name in ("auc", "calibration_error", "loss"))


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_quantile_loss_is_least_at_the_quantile(quantile):
    truths_N = np.random.default_rng(0).exponential(size=1000)
    loss = {
        guess: quantile_loss(truths_N - guess, quantile)
        for guess in np.linspace(0, 4, 401).round(2).tolist()
    }
    assert min(loss, key=loss.get) == pytest.approx(np.quantile(truths_N, quantile), abs=0.02)
    guesses_N = np.full(1000, 0.7)
    assert loss[0.7] == pytest.approx(
        sklearn.metrics.mean_pinball_loss(truths_N, guesses_N, alpha=quantile)
    )


def test_the_best_epoch_respects_the_direction_of_the_metric():
    loss, accuracy = Metric("valid_loss", "lower"), Metric("valid_accuracy", "higher")
    rows = [
        {"epoch": 1, "valid_loss": 0.9, "valid_accuracy": 0.5},
        {"epoch": 2, "valid_loss": 0.4, "valid_accuracy": 0.4},
        {"epoch": 3, "valid_loss": 0.4, "valid_accuracy": 0.3},
    ]
    assert best_epoch(rows, loss)["epoch"] == 3
    assert best_epoch(rows, accuracy)["epoch"] == 1
    assert best_epoch(rows, LAST_EPOCH)["epoch"] == 3
    with pytest.raises(ValueError, match="'up'; expected 'higher' or 'lower'"):
        Metric("mape", "up")


def test_a_nan_metric_is_the_worst():
    rows = [{"epoch": n + 1, "valid_loss": loss} for n, loss in enumerate([np.nan, 0.7, np.nan])]
    assert best_epoch(rows, Metric("valid_loss", "lower"))["epoch"] == 2
    for better, extreme in (("lower", 1e300), ("higher", -1e300)):
        metric = Metric("m", better)
        assert metric.signed({"m": np.nan}) < metric.signed({"m": extreme})


class ValuesByShare(ValueTarget):
    """A custom regression target, measured by the mean absolute percentage error."""

    known_metrics = (Metric("mape", "lower"),)

    def metrics(self, outputs, targets):
        predicted_N = self.decode(outputs)["value"]
        true_N = targets * self.scale + self.mean
        return {"mape": float(np.mean(np.abs(predicted_N / true_N - 1)))}


def test_a_custom_metric_uses_its_declared_direction():
    target = ValuesByShare("y", mean=5.0, scale=1.0)
    metric = task_of(target).find_metric()
    assert metric == Metric("valid_mape", "lower")
    rows = [{"epoch": n, "valid_mape": value} for n, value in enumerate([0.4, 0.1, 0.05])]
    assert best_epoch(rows, metric)["epoch"] == 2
    with pytest.raises(ValueError, match="no metric 'valid_rmse'; there are valid_mape, test_mape"):
        task_of(target).find_metric("valid_rmse")


class Undirected(ValuesByShare):
    known_metrics = ("mape",)


class Undeclared(ValuesByShare):
    known_metrics = (Metric("loss", "lower"),)


def test_a_metric_without_a_direction_is_refused():
    with pytest.raises(ValueError, match=r"known_metrics of Undirected is \('mape',\); expected"):
        task_of(Undirected("y")).metric  # noqa: B018
    task = task_of(Undeclared("y", mean=5.0, scale=1.0))
    with pytest.raises(ValueError, match="Undeclared has the metric 'mape', which its known_"):
        task.metrics({"logits": np.zeros((3, 1))}, np.zeros(3), "valid")


def test_every_target_returns_its_known_metrics():
    target, outputs, truths_N = draw(3)
    labels = LabelsTarget("y").fit(["a", "b", "a|b"])
    costs = ((0.0, 1.0), (3.0, 0.0))
    for each, logits, truths in (
        (target, outputs["logits"], truths_N),
        (replace(draw(2)[0], costs=costs), draw(2)[1]["logits"], draw(2)[2]),
        (labels, np.zeros((4, 2)), np.ones((4, 2), np.uint8)),
        (replace(labels, costs=costs), np.zeros((4, 2)), np.ones((4, 2), np.uint8)),
        (ValueTarget("y", 0.0, 1.0), np.zeros((4, 1)), np.arange(4.0)),
    ):
        found = each.metrics({"logits": logits}, truths)
        assert found.keys() == {metric.name for metric in each.known_metrics}
        assert (each.known_metrics[0].name == "cost") == bool(getattr(each, "costs", ()))
