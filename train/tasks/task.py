"""A task: features and target together, as plain state."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from train.tasks.features import Features, ImageFeatures
from train.tasks.records import Arrays, Record
from train.tasks.targets import ClassTarget, Target

FEATURES = {"image": ImageFeatures}
TARGETS = {"class": ClassTarget}


@dataclass(frozen=True)
class Task:
    """What a model is about. The metric that decides is the target's first."""

    features: Features
    target: Target
    metric: str = "accuracy"

    def encode(self, record: Record) -> tuple[Arrays, int | float]:
        """Return the record's arrays and its target. Raises InvalidRecord."""
        return self.features.encode(record), self.target.encode(record.get(self.target.column))

    def metrics(self, outputs: Arrays, targets: np.ndarray, prefix: str) -> dict[str, float]:
        """The target's metrics, named `{prefix}_{metric}`."""
        values = self.target.metrics(outputs, targets)
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "features": self.features.to_dict(),
            "target": self.target.to_dict(),
            "metric": self.metric,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Raises ValueError for a kind that this version does not know."""
        features, target = state["features"], state["target"]
        for given, known in ((features, FEATURES), (target, TARGETS)):
            if given["kind"] not in known:
                raise ValueError(f"unknown kind '{given['kind']}'; known are {sorted(known)}")
        return cls(
            FEATURES[features["kind"]].from_dict(features),
            TARGETS[target["kind"]].from_dict(target),
            state["metric"],
        )
