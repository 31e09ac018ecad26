"""How outputs become predictions: the quantile of a number, thresholds of classes and labels.

Shapes: N records, K classes or labels.
"""

import math

import numpy as np

from cluster.errors import UserError
from train.config import Config, DecisionRule
from train.stats import paired_interval
from train.tasks import Arrays, ClassTarget, LabelsTarget, NamedTarget, Task, ValueTarget


def apply_options(task: Task, config: Config) -> Task:
    """Return the task with the configured quantile or costs of the decision rule.

    Raises UserError if the options do not fit the target.
    """
    target, rule = task.target, config.decision_rule
    if config.quantile is not None:
        if not isinstance(target, ValueTarget):
            raise UserError(
                "quantile is for a number, and the target is not a number; leave quantile out."
            )
        task = task.with_target(quantile=config.quantile)
    if rule.cost is None and rule.recall is None:
        return task
    if not isinstance(target, NamedTarget):
        raise UserError(
            "decision_rule is for classes and labels, and the target is a number; leave it out."
        )
    if rule.recall is not None:
        if isinstance(target, ClassTarget) and len(target.classes) != 2:
            raise UserError(
                f"decision_rule.recall is for two classes, and '{target.column}' has "
                f"{len(target.classes)}; give decision_rule.cost instead."
            )
        return task
    assert rule.cost is not None
    size = 2 if isinstance(target, LabelsTarget) else len(target.classes)
    if len(rule.cost) != size or any(len(row) != size for row in rule.cost):
        names = ["no", "yes"] if isinstance(target, LabelsTarget) else target.classes[:20]
        raise UserError(
            f"decision_rule.cost has rows of length {', '.join(str(len(r)) for r in rule.cost)}; "
            f"expected {size} rows of {size}, in the order of {', '.join(names)}."
        )
    costs_KK = np.array(rule.cost)
    if (costs_KK < np.diag(costs_KK)[:, None]).any() or not np.isfinite(costs_KK).all():
        raise UserError(
            "decision_rule.cost has a wrong prediction that costs less than the right one of its "
            "row, or a cost that is not finite; in each row the diagonal must cost least."
        )
    if size == 2 and _threshold_for(costs_KK) is None:
        raise UserError(
            "decision_rule.cost has no wrong prediction that costs more than a right one; give one "
            "of them a higher cost."
        )
    return task.with_target(costs=rule.cost)


def fit_thresholds(
    task: Task, rule: DecisionRule, outputs: Arrays, targets: np.ndarray
) -> tuple[float, ...]:
    """Return the thresholds of a rule, fitted to records that the network was not trained on.

    outputs: {"logits": float32 [N, K]}, not yet divided by the task's temperature. targets: as the
    task encodes them, int64 [N] for classes and uint8 [N, K] for labels. The result is empty
    without a rule, for costs of more than two classes, and for a numeric target.
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


def check_recall(task: Task, rule: DecisionRule, targets: np.ndarray) -> None:
    """Raises UserError if too few validation records of a class are given for a rule of recall.

    targets: as the task encodes them, int64 [N] for classes and uint8 [N, K] for labels.
    """
    target = task.target
    if rule.recall is None or not isinstance(target, NamedTarget):
        return
    least = math.ceil(1 / (1 - rule.recall) - 1e-9) - 1
    if isinstance(target, ClassTarget):
        counts = {target.classes[target.rarest]: int((targets == target.rarest).sum())}
    else:
        counts = dict(zip(target.classes, (targets > 0).sum(axis=0).tolist(), strict=True))
    for name, count in counts.items():
        if count < least:
            raise UserError(
                f"decision_rule.recall is {rule.recall:g}, which needs at least {least} validation "
                f"records of '{name}', and there are {count}; give more records, a larger "
                "data.valid_fraction, or a lower recall."
            )


def recall_threshold(scores_N: np.ndarray, true_N: np.ndarray, recall: float) -> float:
    """Return the threshold that new records of the class reach with probability `recall` or more.

    scores_N: float [N]. true_N: bool [N], whether a record is of the class. With n records of the
    class, the threshold is the floor((n + 1)(1 - recall))-th lowest of their scores. The score of a
    new record is equally likely to fall into each of the n + 1 gaps between these scores, so it
    reaches the threshold with a probability of at least `recall` for any distribution of scores. If
    n is too small, the threshold is 0, which every record reaches. After Vovk et al., Algorithmic
    Learning in a Random World, 2005.
    """
    known = np.sort(scores_N[true_N])
    place = math.floor((len(known) + 1) * (1 - recall) + 1e-9)
    return float(known[place - 1]) if place else 0.0


def cost_threshold(scores_N: np.ndarray, true_N: np.ndarray, costs_22: np.ndarray) -> float:
    """Return the threshold with the least expected cost.

    scores_N: float [N], probabilities. true_N: bool [N], whether a record is of the class.
    costs_22: float [2, 2], by truth (rows) and prediction (columns), no before yes.

    For calibrated probabilities the threshold follows from the costs alone. The threshold that
    costs least on these records is returned instead if this choice is significantly cheaper: each
    half of the records is judged at the threshold of the other half, and the 95 % interval of the
    difference in cost must be below 0.
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
    """Return the threshold, midway between two scores, that costs least on these records."""
    order = np.argsort(-scores_N, kind="stable")
    sorted_N = scores_N[order]
    # Cost of predicting yes for all records down to this one, compared with predicting no.
    added_N = np.cumsum((costs_22[:, 1] - costs_22[:, 0])[truth_N[order]])
    ends = np.flatnonzero(np.r_[sorted_N[1:] != sorted_N[:-1], True])
    best = ends[int(np.argmin(added_N[ends]))]
    below = sorted_N[best + 1] if best + 1 < len(sorted_N) else 0.0
    return float((sorted_N[best] + below) / 2)


def _threshold_for(costs_22: np.ndarray) -> float | None:
    """Return the probability from which predicting yes costs less than predicting no.

    None if wrong predictions cost no more than right ones.
    """
    false_yes = float(costs_22[0, 1] - costs_22[0, 0])
    false_no = float(costs_22[1, 0] - costs_22[1, 1])
    total = false_yes + false_no
    return false_yes / total if total > 0 else None
