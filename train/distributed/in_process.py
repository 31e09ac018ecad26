"""Run Ray Train's controller in this process, for workers that end with this process.

Ray Train runs its controller in a separate process, with three more processes: one frees the
workers' resources if the controller dies, one requests more machines, one feeds Ray Data sets. They
are not needed if Ray runs on one machine and ends with this process: resources need not be freed or
requested, and the loop reads its own shards. A tuning trial does not need them either: its workers
run in the placement group of the trial's process, which is removed with the process. The controller
therefore runs alone in this process, which starts training seconds sooner.
"""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.util.placement_group import get_current_placement_group

from train.distributed.ray_train_internals import (
    DatasetsCallback,
    DefaultPlacementGroupHandle,
    FixedScalingPolicy,
    PlacementGroupCleanerCallback,
    TrainController,
    WorkerGroup,
)


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
        # The controller has configured its logging by now. It logs each of its steps, but the
        # terminal is for the progress of the run.
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        _run(controller.run())
        return controller.get_result()


def _run(controller: Coroutine[Any, Any, None]) -> None:
    """Run the controller to its end, also where an event loop already runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(controller)
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="controller", daemon=True)
    thread.start()
    running = asyncio.run_coroutine_threadsafe(controller, loop)
    try:
        running.result()
    except BaseException:
        running.cancel()
        raise
    finally:
        # Once the coroutine has ended, which its cancellation only requests.
        asyncio.run_coroutine_threadsafe(_rest(), loop).add_done_callback(
            lambda _: loop.call_soon_threadsafe(loop.stop)
        )
        thread.join()
        loop.close()


async def _rest() -> None:
    """Wait for all other tasks of this event loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


class _Scaling(FixedScalingPolicy):
    """Does not request machines."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _Reserved(DefaultPlacementGroupHandle):
    """Handle of an existing placement group, which stays when the workers end."""

    def shutdown(self) -> None:
        pass


class _WorkerGroup(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        own = get_current_placement_group()
        if own is None:
            return super()._create_placement_group(scaling_config, worker_group_context)
        return _Reserved(own)

    def _create_workers(self, num_workers: int, *args: Any, **kwargs: Any) -> list[Any]:
        if get_current_placement_group() is not None:
            # This process uses the first bundle.
            kwargs["placement_group_bundle_indices"] = list(range(1, num_workers + 1))
        workers: list[Any] = super()._create_workers(num_workers, *args, **kwargs)
        return workers

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """Initialise the workers without a handle of a controller actor, because there is none."""
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
