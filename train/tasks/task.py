"""A task: the features and the target of a model. Shapes: N records, K outputs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from train.metrics import LAST, LAST_EPOCH, Metric
from train.tasks.classification import ClassTarget
from train.tasks.features import Features, encoder_class
from train.tasks.multilabel import LabelsTarget
from train.tasks.regression import ValueTarget
from train.tasks.targets import NamedTarget, Target
from train.tasks.tensors import RawOutputs
from train.values.records import Arrays, Columns, shorten

TARGETS: dict[str, type[Target]] = {
    target.kind: target for target in (ClassTarget, LabelsTarget, ValueTarget)
}
# Targets of saved tasks, which include those of models that were imported without records.
SAVED_TARGETS = {**TARGETS, RawOutputs.kind: RawOutputs}


@dataclass(frozen=True)
class Task:
    """The features and the target of a model.

    A custom task is a subclass, which configs name as package.module:Class. `of` makes an unfitted
    task; features and target are fitted separately.
    """

    features: Features
    target: Target

    @classmethod
    def of(
        cls, kinds: Mapping[str, Mapping[str, Any]], column: str, task_type: str, **options: Any
    ) -> Self:
        """Return an unfitted task that predicts `column` from columns of the given kinds.

        task_type: "classification", "multilabel" or "regression". kinds, options: arguments of
        `Features.of`.
        """
        of_target = {}
        if task_type == ValueTarget.kind:
            of_target["decimal"] = options.get("decimal")
        target = TARGETS[task_type](column, **of_target)  # type: ignore[call-arg]
        return cls(Features.of(kinds, **options), target)

    @property
    def known_metrics(self) -> tuple[Metric, ...]:
        """The target's metrics, the main one first.

        Raises ValueError if a custom target does not declare them as `Metric`.
        """
        declared = getattr(self.target, "known_metrics", ())
        if isinstance(self.target, RawOutputs):
            return ()
        if not declared or not all(isinstance(each, Metric) for each in declared):
            raise ValueError(
                f"known_metrics of {type(self.target).__name__} is {shorten(declared)}; expected "
                "train.tasks.Metric(name, better='higher' or 'lower') for each metric"
            )
        return tuple(declared)

    @property
    def is_measured(self) -> bool:
        """Whether the model has metrics; those imported without records have none."""
        return bool(self.known_metrics)

    @property
    def metric(self) -> str:
        """Name of the main metric, which is the target's first. A measured model has one."""
        return self.known_metrics[0].name

    def find_metric(self, name: str | None = None) -> Metric:
        """Return a metric by its name with the split, such as "valid_loss".

        name: None stands for the main metric on the validation split, LAST for the number of the
        epoch. Raises ValueError for an unknown name.
        """
        if name == LAST:
            return LAST_EPOCH
        of_splits = {
            metric.name: metric
            for split in ("valid", "test")
            for metric in (each.of_split(split) for each in self.known_metrics)
        }
        wanted = name or f"valid_{self.metric}"
        if wanted not in of_splits:
            raise ValueError(f"there is no metric '{wanted}'; there are {', '.join(of_splits)}")
        return of_splits[wanted]

    @property
    def kind(self) -> str:
        """The "kind" of the saved state, by which `from_dict` finds the class."""
        own = type(self)
        return "task" if own is Task else f"{own.__module__}:{own.__qualname__}"

    def with_target(self, **changes: Any) -> Self:
        """Return a copy of the task with fields of its target changed."""
        return replace(self, target=replace(self.target, **changes))  # type: ignore[type-var]

    def calibrated(self, temperature: float) -> Self:
        """Return the task with this temperature; a task without probabilities is unchanged."""
        if not isinstance(self.target, NamedTarget):
            return self
        return self.with_target(temperature=temperature)

    def undecided(self) -> Self:
        """Return the task without temperature, decision rule and quantile."""
        if isinstance(self.target, ValueTarget):
            return self.with_target(quantile=None)
        if not isinstance(self.target, NamedTarget):
            return self
        return self.with_target(temperature=1.0, costs=(), thresholds=())

    def encode(self, columns: Columns) -> tuple[Arrays, np.ndarray]:
        """Return the arrays of N records, [N, …] each, and their targets, [N] or [N, K].

        Raises InvalidRecord.
        """
        targets_N = self.target.encode(columns[self.target.column])
        return self.features.encode(columns), targets_N

    def metrics(self, outputs: Arrays, targets: np.ndarray, prefix: str) -> dict[str, float]:
        """Return the target's metrics by name, as `{prefix}_{metric}`.

        outputs: {"logits": float [N, K]}. targets: [N] or [N, K], from `encode`. Raises ValueError
        if a custom target returns a metric that it does not declare.
        """
        values = self.target.metrics(outputs, targets)
        if unknown := values.keys() - {each.name for each in self.known_metrics}:
            raise ValueError(
                f"{type(self.target).__name__} has the metric '{min(unknown)}', which its "
                "known_metrics do not declare"
            )
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def metric_value(self, name: str, outputs: Arrays, targets: np.ndarray) -> float:
        """Return one of the target's metrics; the others are not computed if avoidable.

        name: without the split. outputs: {"logits": float [N, K]}. targets: [N] or [N, K].
        """
        if type(self.target) is ClassTarget:
            return self.target.metric(name, outputs, targets)
        return self.target.metrics(outputs, targets)[name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "features": self.features.to_dict(),
            "target": self.target.to_dict(),
        }

    @staticmethod
    def from_dict(state: dict[str, Any]) -> "Task":
        """Return the task of a state that `to_dict` returned.

        Raises ValueError for an unknown kind or a class that is not a subclass of Task.
        """
        features = Features.from_dict(state["features"])
        target = encoder_class(state["target"], SAVED_TARGETS).from_dict(state["target"])
        own = encoder_class(state, {"task": Task})
        if not (isinstance(own, type) and issubclass(own, Task)):
            raise ValueError(f"'{state['kind']}' is not a subclass of train.tasks.Task")
        return own(features, target)
