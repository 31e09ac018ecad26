"""Ray Train for a Ray that ends with this process: the same workers, without what guards them.

Ray Train keeps its controller in a process of its own, with three more beside it: one frees the
workers' resources should the controller die, one asks for more machines, one feeds Ray Data sets.
On one machine there is nothing to ask for, when this process ends everything ends, and the loop
reads its own shards. So the controller runs here, alone, which is seconds sooner.
"""

import asyncio
import logging
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup


class LocalTorchTrainer(TorchTrainer):
    """A TorchTrainer whose controller runs in this process."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, PlacementGroupCleanerCallback | DatasetsCallback)
        ]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        controller = _Controller(**{**parts, "scaling_policy": _Scaling(self.scaling_config)})
        # It has set up its log; each of its steps is told there, the terminal is for the run's.
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        asyncio.run(controller.run())
        return controller.get_result()


class _Scaling(FixedScalingPolicy):
    """Asks for no machines."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkerGroup(WorkerGroup):
    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """Without the handle of the controller's actor, since there is none."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup
