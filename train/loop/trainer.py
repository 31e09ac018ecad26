"""Ray Train, with less of what a local Ray does not need."""

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)


class LocalTorchTrainer(TorchTrainer):
    """A TorchTrainer for a Ray that ends with this process.

    Without the actor that frees the workers' resources should the controller die: it asks the
    dashboard, which a lean Ray has not, every second, and its process takes seconds to start.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, PlacementGroupCleanerCallback)
        ]
