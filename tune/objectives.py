"""Objectives of a study: figures of the model, and of the variants that will be served."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from cluster.errors import UserError
from train.bundle.manifest import BATCH_SIZES, Variant
from train.config import Variant as VariantName
from train.tasks import Metric

# Variants that need no further training, because a trial has no workers for it.
MADE_AT_ONCE = tuple(
    name for name in get_args(VariantName) if not name.startswith(("pruned", "distilled"))
)
BYTES, LATENCY = "bytes", "p50_ms"
CONDITION = re.compile(r"(\S+)\s*(<=|>=|≤|≥)\s*([-+.\deE]+)")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "≤": operator.le,
    ">=": operator.ge,
    "≥": operator.ge,
}
GRAMMAR = "'best OBJECTIVE [with OBJECTIVE <= NUMBER [and …]]'"


@dataclass(frozen=True)
class Objective:
    """A figure of a finished trial: of its model (variant is None) or of one of its variants."""

    name: str
    variant: str | None
    metric: Metric

    @property
    def of_task(self) -> bool:
        """Whether this is a metric of the task rather than a size or a latency."""
        return self.metric.name.startswith("valid_")

    @property
    def maximize(self) -> bool:
        """Whether a higher value is better."""
        return self.metric.better == "higher"

    def signed(self, value: float) -> float:
        """Return the value with the sign that makes higher better; -inf for NaN."""
        return self.metric.signed({self.metric.name: value})

    def of(self, net: Mapping[str, float], served: Mapping[str, Mapping[str, Any]]) -> float:
        """Return the value of this objective.

        net: figures of the model. served: figures of each variant, by `variant_metrics`.
        """
        found = net if self.variant is None else served[self.variant]
        return float(found[self.metric.name])


@dataclass(frozen=True)
class Condition:
    """A bound for an objective, such as `fp32.p50_ms <= 2`."""

    objective: Objective
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        """Return whether a value of the objective is within the bound."""
        return COMPARISONS[self.comparison](value, self.bound)

    def __str__(self) -> str:
        return f"{self.objective.name} {self.comparison} {self.bound:g}"


@dataclass(frozen=True)
class SelectionRule:
    """The rule for the winner: the best in one objective among the trials within some bounds."""

    best: Objective
    conditions: tuple[Condition, ...] = ()

    @property
    def objectives(self) -> list[Objective]:
        """The objectives that the rule reads."""
        return [self.best, *(condition.objective for condition in self.conditions)]


@dataclass(frozen=True)
class Goals:
    """The figures by which the trials of a study are measured."""

    objectives: tuple[Objective, ...]
    pick: SelectionRule

    @property
    def early(self) -> Metric:
        """The metric of the model by which running trials are compared."""
        return next(each.metric for each in self.objectives if each.of_task)

    @property
    def measured(self) -> tuple[Objective, ...]:
        """All figures of a complete trial, without duplicates."""
        return tuple(dict.fromkeys((*self.objectives, *self.pick.objectives)))

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that a trial must make."""
        return tuple(dict.fromkeys(each.variant for each in self.measured if each.variant))


def study_goals(names: Sequence[str], pick: str | None, known: Sequence[Metric]) -> Goals:
    """Return the goals of a study.

    names: the configured objectives; the task's main metric if empty. pick: the rule for the
    winner. known: the metrics of the task, the main one first.
    Raises UserError if the rule is malformed or the task does not have an objective.
    """
    task = [metric.of_split("valid") for metric in known]
    own = task[0].name
    objectives = tuple(_objective(name, task) for name in names or (own,))
    chosen = SelectionRule(objectives[0]) if pick is None else _pick(pick, task)
    found = Goals(objectives, chosen)
    if not any(each.of_task for each in objectives):
        # Running trials can only be compared by a metric of the task.
        found = Goals((*objectives, _objective(own, task)), chosen)
    return found


def variant_metrics(variant: Variant) -> dict[str, Any]:
    """Return the figures of a variant that objectives can use.

    Metrics of the test split are left out, because no choice may depend on that split.
    """
    return {
        "verdict": variant.verdict,
        BYTES: variant.size_bytes,
        LATENCY: variant.p50_ms,
        **{f"{LATENCY}@{size}": variant.ms(size) for size in BATCH_SIZES},
        **{name: value for name, value in variant.metrics.items() if name.startswith("valid_")},
    }


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other point dominates.

    points: signed figures, for which higher is better; all points have the same length.
    """

    def beaten(mine: Sequence[float], other: Sequence[float]) -> bool:
        return all(o >= m for o, m in zip(other, mine, strict=True)) and tuple(other) != tuple(mine)

    return [
        at for at, point in enumerate(points) if not any(beaten(point, other) for other in points)
    ]


def _objective(name: str, known: Sequence[Metric]) -> Objective:
    variant, dot, wanted = name.rpartition(".")
    of_net = {metric.name: metric for metric in known}
    of_served = [BYTES, LATENCY, *(f"{LATENCY}@{size}" for size in BATCH_SIZES)]
    of_variant = of_net | {name: Metric(name, "lower") for name in of_served}
    if not dot:
        if wanted in of_net:
            return Objective(name, None, of_net[wanted])
    elif variant in MADE_AT_ONCE and wanted in of_variant:
        return Objective(name, variant, of_variant[wanted])
    names = ", ".join((*of_net, BYTES, f"{LATENCY}@{'|'.join(map(str, BATCH_SIZES))}"))
    raise UserError(
        f"objective '{name}' is unknown for this task; expected {', '.join(of_net)}, or "
        f"VARIANT.METRIC with one of {names} and one of the variants {', '.join(MADE_AT_ONCE)}."
    )


def _pick(rule: str, metrics: Sequence[Metric]) -> SelectionRule:
    words, _, bounds = rule.strip().partition(" with ")
    verb, _, name = words.partition(" ")
    if verb != "best" or not name.strip():
        raise UserError(f"tune.pick is '{rule}'; expected {GRAMMAR}.")
    conditions = []
    for part in bounds.split(" and ") if bounds else []:
        match = CONDITION.fullmatch(part.strip())
        if match is None:
            raise UserError(f"tune.pick is '{rule}', with the bound '{part}'; expected {GRAMMAR}.")
        try:
            bound = float(match[3])
        except ValueError as error:
            raise UserError(
                f"tune.pick is '{rule}', where '{match[3]}' is not a number; expected {GRAMMAR}."
            ) from error
        conditions.append(Condition(_objective(match[1], metrics), match[2], bound))
    return SelectionRule(_objective(name.strip(), metrics), tuple(conditions))
