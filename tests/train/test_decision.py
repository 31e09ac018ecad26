"""Decision thresholds, against brute force and simulations of their guarantees."""

import numpy as np
import pytest

from cluster.errors import UserError
from tests.conftest import make_config
from train.decision import (
    apply_options,
    check_recall,
    cost_threshold,
    fit_thresholds,
    recall_threshold,
)
from train.tasks import ClassTarget, Features, LabelsTarget, Task, ValueTarget

COSTS = np.array([[0.0, 1.0], [9.0, 0.0]])


def class_task(counts=(95, 5)):
    return Task(Features(()), ClassTarget("y", tuple("abcdef"[: len(counts)]), counts))


def rule(**values):
    return make_config(decision_rule=values).decision_rule


def applied(task, **values):
    return apply_options(task, make_config(decision_rule=values))


def logits(yes_N):
    """Return the outputs of two classes for probabilities [N] of the second one."""
    yes_N = np.clip(np.asarray(yes_N, np.float64), 1e-6, 1 - 1e-6)
    return {"logits": np.stack([np.zeros_like(yes_N), np.log(yes_N / (1 - yes_N))], axis=1)}


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("num_known", [9, 40, 300])
def test_new_records_reach_the_requested_recall(rng, recall, num_known):
    """On average over draws of the known records, and by at most 1 / (n + 1) more."""
    found = []
    for _ in range(2000):
        known_N, new_N = rng.normal(size=num_known), rng.normal(size=200)
        threshold = recall_threshold(known_N, np.ones(num_known, bool), recall)
        found.append(np.mean(new_N >= threshold))
    error = 4 * np.std(found) / np.sqrt(len(found))
    assert recall - error <= np.mean(found) <= recall + 1 / (num_known + 1) + error


@pytest.mark.parametrize(("recall", "least"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.99, 99)])
def test_a_recall_needs_enough_records_of_the_class(recall, least):
    task = class_task()
    enough, few = ([0] * 500 + [1] * count for count in (least, least - 1))
    check_recall(task, rule(recall=recall), np.array(enough))
    assert recall_threshold(np.full(least, 0.5), np.ones(least, bool), recall) == 0.5
    with pytest.raises(UserError, match=f"at least {least} .* 'b', and there are {least - 1}"):
        check_recall(task, rule(recall=recall), np.array(few))


def test_each_label_needs_enough_records_for_a_recall():
    task = Task(Features(()), LabelsTarget("y", ("a", "b"), (9, 9)))
    targets_NK = np.zeros((20, 2), np.uint8)
    targets_NK[:9, 0] = targets_NK[:8, 1] = 1
    with pytest.raises(UserError, match="'b', and there are 8"):
        check_recall(task, rule(recall=0.9), targets_NK)


def test_too_few_records_for_a_recall_give_threshold_zero():
    assert recall_threshold(np.array([0.9, 0.8]), np.array([True, True]), 0.9) == 0.0


def test_calibrated_probabilities_get_the_threshold_of_the_costs(rng):
    """The threshold of least cost on a few records would be worse on new ones."""
    scores_N = rng.beta(0.5, 3, 300)
    truths_N = rng.random(300) < scores_N
    assert cost_threshold(scores_N, truths_N, COSTS) == pytest.approx(0.1)


def test_a_significantly_better_threshold_is_found(rng):
    """The scores are squared probabilities, as from a badly calibrated net."""
    probabilities_N = rng.beta(0.5, 2, 20_000)
    truths_N = rng.random(20_000) < probabilities_N
    found = cost_threshold(probabilities_N**2, truths_N, COSTS)
    assert found == pytest.approx(0.01, abs=0.006)

    def cost(threshold):
        chosen_N = (probabilities_N**2 >= threshold).astype(int)
        return COSTS[truths_N.astype(int), chosen_N].mean()

    assert cost(found) == pytest.approx(min(map(cost, np.linspace(0, 0.1, 2001))), rel=0.01)


@pytest.mark.parametrize("counts", [(95, 5), (5, 95)])
def test_the_threshold_applies_to_the_rarer_class(counts):
    """Its decisions are those of the least expected cost, in either order of the classes."""
    task = applied(class_task(counts), cost=[[0, 1], [4, 0]])
    probabilities_N = np.linspace(0, 1, 101)
    outputs = logits(probabilities_N)
    by_costs_N = task.target.choose(task.target.probabilities(outputs))
    assert by_costs_N.tolist() == (probabilities_N > 0.2 + 1e-9).astype(int).tolist()
    truths_N = (probabilities_N > 0.5).astype(int)[:3]
    few = {"logits": outputs["logits"][:3]}
    thresholds = fit_thresholds(task, rule(cost=[[0, 1], [4, 0]]), few, truths_N)
    assert thresholds == pytest.approx([0.2 if counts == (95, 5) else 0.8])
    fitted = task.with_target(thresholds=thresholds).target
    inside_N = np.abs(probabilities_N - 0.2) > 1e-6
    chosen_N = fitted.choose(fitted.probabilities(outputs))
    assert chosen_N[inside_N].tolist() == by_costs_N[inside_N].tolist()


def test_the_class_of_least_expected_cost_is_chosen(rng):
    costs = [[0, 1, 5], [2, 0, 1], [1, 8, 0]]
    task = applied(class_task((10, 20, 30)), cost=costs)
    outputs = {"logits": rng.normal(size=(200, 3))}
    probabilities_NK = task.target.probabilities(outputs)
    expected = [
        min(range(3), key=lambda answer: sum(p[true] * costs[true][answer] for true in range(3)))
        for p in probabilities_NK.astype(float)
    ]
    chosen_N = task.target.choose(probabilities_NK)
    assert chosen_N.tolist() == expected
    truths_N = rng.integers(0, 3, 200)
    paid = np.mean([costs[t][c] for t, c in zip(truths_N, expected, strict=True)])
    metrics = task.metrics(outputs, truths_N, "valid")
    assert metrics["valid_cost"] == pytest.approx(paid)
    assert task.metric == "cost"
    assert metrics["valid_accuracy"] == pytest.approx(np.mean(truths_N == expected))
    assert fit_thresholds(task, rule(cost=costs), outputs, truths_N) == ()


def test_each_label_has_its_own_threshold(rng):
    task = Task(Features(()), LabelsTarget("y", ("a", "b"), (50, 10), num_records=100))
    truths_NK = rng.random((4000, 2)) < [0.5, 0.1]
    outputs = {"logits": rng.normal(size=(4000, 2)) + 2 * truths_NK - [0, 4]}
    thresholds = fit_thresholds(task, rule(recall=0.9), outputs, truths_NK.astype(np.uint8))
    target = task.with_target(thresholds=thresholds).target
    chosen_NK = target.choose(target.probabilities(outputs))
    np.testing.assert_allclose(
        [chosen_NK[truths_NK[:, k], k].mean() for k in (0, 1)], 0.9, atol=0.004
    )
    labels = target.decode(outputs)["label"]
    assert labels[0] == "|".join(np.array(["a", "b"])[chosen_NK[0]])
    restored = LabelsTarget.from_dict(target.to_dict())
    assert (restored.thresholds, restored.costs) == (thresholds, ())


@pytest.mark.parametrize(
    ("task", "values", "words"),
    [
        (class_task((1, 1, 1)), {"recall": 0.9}, "is for two classes, and 'y' has 3"),
        (class_task(), {"cost": [[0, 1, 2], [1, 0, 2]]}, "2 rows of 2, in the order of a, b"),
        (class_task(), {"cost": [[1, 0], [1, 0]]}, "costs less than the right one"),
        (class_task(), {"cost": [[0, 0], [0, 0]]}, "no wrong prediction that costs more"),
        (Task(Features(()), ValueTarget("y", 0, 1)), {"recall": 0.9}, "the target is a number"),
    ],
)
def test_a_rule_that_does_not_fit_the_target_is_refused(task, values, words):
    with pytest.raises(UserError, match=words):
        applied(task, **values)


def test_costs_and_recall_together_are_refused():
    with pytest.raises(UserError, match="both cost and recall; give one"):
        rule(cost=[[0, 1], [1, 0]], recall=0.9)


def test_the_quantile_option_requires_a_numeric_target():
    config = make_config(quantile=0.9)
    task = apply_options(Task(Features(()), ValueTarget("y", 0.0, 1.0)), config)
    assert (task.target.quantile, task.metric, task.target.loss) == (
        0.9,
        "quantile_loss",
        "pinball",
    )
    assert Task.from_dict(task.to_dict()).target.quantile == 0.9
    with pytest.raises(UserError, match="quantile is for a number"):
        apply_options(class_task(), config)
