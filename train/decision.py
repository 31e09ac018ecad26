"""What is answered: a quantile, or which probability is enough for a class or a label.

Shapes: N records, K classes or labels.
"""

import math

import numpy as np

from cluster.errors import UserError
from train.config import Config, DecisionRule
from train.stats import paired_interval
from train.tasks import Arrays, ClassTarget, LabelsTarget, NamedTarget, Task, ValueTarget


def apply_options(task: Task, config: Config) -> Task:
    """Return the task with the quantile, or the costs of the decision rule, that are configured.

    Raises UserError for options that do not fit the target.
    """
    target, rule = task.target, config.decision_rule
    if config.quantile is not None:
        if not isinstance(target, ValueTarget):
            raise UserError("quantile is for a number to predict; leave it out.")
        task = task.with_target(quantile=config.quantile)
    if rule.cost is None and rule.recall is None:
        return task
    if not isinstance(target, NamedTarget):
        raise UserError("decision_rule is for classes and labels, and the target is a number.")
    if rule.recall is not None:
        if isinstance(target, ClassTarget) and len(target.classes) != 2:
            raise UserError(
                f"decision_rule.recall is for two classes, and '{target.column}' has "
                f"{len(target.classes)}; give decision_rule.cost."
            )
        return task
    assert rule.cost is not None
    size = 2 if isinstance(target, LabelsTarget) else len(target.classes)
    if len(rule.cost) != size or any(len(row) != size for row in rule.cost):
        names = ["no", "yes"] if isinstance(target, LabelsTarget) else target.classes[:20]
        raise UserError(
            f"decision_rule.cost has rows of {', '.join(str(len(row)) for row in rule.cost)}; "
            f"expected {size} rows of {size}, in the order of {', '.join(names)}."
        )
    costs_KK = np.array(rule.cost)
    if (costs_KK < np.diag(costs_KK)[:, None]).any() or not np.isfinite(costs_KK).all():
        raise UserError(
            "decision_rule.cost has a wrong answer that costs less than the right one of its row."
        )
    if size == 2 and _threshold_for(costs_KK) is None:
        raise UserError("decision_rule.cost has no wrong answer that costs more than a right one.")
    return task.with_target(costs=rule.cost)


def fit_thresholds(
    task: Task, rule: DecisionRule, outputs: Arrays, targets: np.ndarray
) -> tuple[float, ...]:
    """Return the thresholds of a rule, from records that the net was not trained on.

    outputs: {"logits": [N, K]}, which the task's temperature calibrates. Empty where the rule needs
    none: without a rule, and for costs of more than two classes.
    """
    target = task.target
    if isinstance(target, ClassTarget):
        scores_NK = target.probabilities(outputs)[:, [target.rarest]]
        true_NK = (targets == target.rarest)[:, None]
        order = [1 - target.rarest, target.rarest]
    elif isinstance(target, LabelsTarget):
        scores_NK, true_NK, order = target.probabilities(outputs), targets > 0, [0, 1]
    else:
        return ()
    columns = list(zip(scores_NK.T, true_NK.T, strict=True))
    if rule.recall is not None:
        return tuple(recall_threshold(*each, rule.recall) for each in columns)
    if rule.cost is None or len(rule.cost) != 2:
        return ()
    costs_22 = np.array(rule.cost)[np.ix_(order, order)]
    return tuple(cost_threshold(*each, costs_22) for each in columns)


def recall_threshold(scores_N: np.ndarray, true_N: np.ndarray, recall: float) -> float:
    """Return the threshold at which new records of the class are recognised in `recall` of cases.

    Of n records of the class, the score that is the floor((n + 1)(1 - recall))-th from below: a new
    one is equally likely to fall between any two of them, so that it reaches this score with a
    probability of at least `recall` whatever the scores are. 0, which all reach, where n is too
    small. After Vovk et al., Algorithmic Learning in a Random World, 2005.
    """
    known = np.sort(scores_N[true_N])
    place = math.floor((len(known) + 1) * (1 - recall) + 1e-9)
    return float(known[place - 1]) if place else 0.0


def cost_threshold(scores_N: np.ndarray, true_N: np.ndarray, costs_22: np.ndarray) -> float:
    """Return the threshold with the least expected cost.

    costs_22: by what is true and what is answered, no before yes. For calibrated probabilities the
    costs alone decide it. The one that costs least on these records is taken instead where that way
    of choosing costs less by more than chance: thresholds of either half on the records of the
    other, by the 95 % interval.
    """
    by_costs = _threshold_for(costs_22)
    assert by_costs is not None
    truth_N = true_N.astype(int)

    def costs_of(threshold: float, rows: slice) -> np.ndarray:
        chosen_N = (scores_N[rows] >= np.float32(threshold)).astype(int)
        found: np.ndarray = costs_22[truth_N[rows], chosen_N]
        return found

    if len(scores_N) < 4:
        return by_costs
    halves = slice(0, None, 2), slice(1, None, 2)
    found_N = np.concatenate(
        [
            costs_of(_cheapest(scores_N[one], truth_N[one], costs_22), other)
            for one, other in (halves, halves[::-1])
        ]
    )
    costs_N = np.concatenate([costs_of(by_costs, rows) for rows in halves[::-1]])
    _, high = paired_interval(costs_N, found_N, binary=False)
    return _cheapest(scores_N, truth_N, costs_22) if high < 0 else by_costs


def _cheapest(scores_N: np.ndarray, truth_N: np.ndarray, costs_22: np.ndarray) -> float:
    """The threshold, between two scores, that costs least on these records."""
    order = np.argsort(-scores_N, kind="stable")
    sorted_N = scores_N[order]
    # What it costs to say yes down to each record, over saying no.
    added_N = np.cumsum((costs_22[:, 1] - costs_22[:, 0])[truth_N[order]])
    ends = np.flatnonzero(np.r_[sorted_N[1:] != sorted_N[:-1], True])
    best = ends[int(np.argmin(added_N[ends]))]
    below = sorted_N[best + 1] if best + 1 < len(sorted_N) else 0.0
    return float((sorted_N[best] + below) / 2)


def _threshold_for(costs_22: np.ndarray) -> float | None:
    """The probability of yes from which saying yes costs less than saying no."""
    false_yes = float(costs_22[0, 1] - costs_22[0, 0])
    false_no = float(costs_22[1, 0] - costs_22[1, 1])
    total = false_yes + false_no
    return false_yes / total if total > 0 else None
