"""A task: features and target together, as plain state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from train.tasks.classification import ClassTarget, LabelsTarget, NamedTarget
from train.tasks.features import Features, encoder_class
from train.tasks.records import Arrays, Columns
from train.tasks.regression import ValueTarget
from train.tasks.targets import Target

TARGETS: dict[str, type[Target]] = {
    target.kind: target for target in (ClassTarget, LabelsTarget, ValueTarget)
}


@dataclass(frozen=True)
class Task:
    """What a model is about. A user's own task is a subclass, named by package.module:Class.

    `of` says what it is made of; features and target are fitted apart.
    """

    features: Features
    target: Target

    @classmethod
    def of(
        cls, kinds: Mapping[str, Mapping[str, Any]], column: str, task_type: str, **options: Any
    ) -> Self:
        """Return the task that predicts `column` from columns of the given kinds, not yet fitted.

        task_type: "classification", "multilabel" or "regression". options: of `Features.of`.
        """
        return cls(Features.of(kinds, **options), TARGETS[task_type](column))  # type: ignore[call-arg]

    @property
    def metric(self) -> str:
        """The metric that decides: the target's first."""
        return self.target.metric_names[0]

    @property
    def kind(self) -> str:
        """Where the class is found again."""
        own = type(self)
        return "task" if own is Task else f"{own.__module__}:{own.__qualname__}"

    def calibrated(self, temperature: float) -> Self:
        """Return the task with another temperature of its probabilities, where it has any."""
        if not isinstance(self.target, NamedTarget):
            return self
        return replace(self, target=replace(self.target, temperature=temperature))

    def encode(self, columns: Columns) -> tuple[Arrays, np.ndarray]:
        """Return the arrays of N records and their targets. Raises InvalidRecord."""
        targets_N = self.target.encode(columns[self.target.column])
        return self.features.encode(columns), targets_N

    def metrics(self, outputs: Arrays, targets: np.ndarray, prefix: str) -> dict[str, float]:
        """The target's metrics, named `{prefix}_{metric}`."""
        values = self.target.metrics(outputs, targets)
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "features": self.features.to_dict(),
            "target": self.target.to_dict(),
        }

    @staticmethod
    def from_dict(state: dict[str, Any]) -> "Task":
        """Raises ValueError for a kind that this version does not know."""
        features = Features.from_dict(state["features"])
        target = encoder_class(state["target"], TARGETS).from_dict(state["target"])
        own = encoder_class(state, {"task": Task})
        if not (isinstance(own, type) and issubclass(own, Task)):
            raise ValueError(f"'{state['kind']}' is no subclass of train.tasks.Task")
        return own(features, target)
