"""The private names of Ray Train that this project uses.

Written for Ray 2.60. `tests/test_ray_internals.py` uses each name, so that it fails with an
incompatible version of Ray. This module does not import torch, because Ray Train's controller
imports this module.
"""

from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
)
from ray.train.v2.api.exceptions import TrainingFailedError

# The loggers of Ray Train that report attempts to start the workers, and failures.
START_LOGGERS = (
    "ray.train.v2._internal.execution.controller.controller",
    "ray.train.v2._internal.execution.failure_handling.default",
    "ray.train.v2._internal.execution.worker_group.worker_group",
)


def preemption_notice() -> Any:
    """Return the notice that a machine of this run will be preempted, or None."""
    return get_train_context().preemption_context.preemption_info


__all__ = [
    "START_LOGGERS",
    "ControllerCallback",
    "DatasetsCallback",
    "DefaultPlacementGroupHandle",
    "FixedScalingPolicy",
    "PlacementGroupCleanerCallback",
    "TrainController",
    "TrainingFailedError",
    "WorkerGroup",
    "WorkerGroupStartupTimeoutError",
    "preemption_notice",
]
