"""Request a checkpoint before the workers are stopped to change their number.

This runs in Ray Train's controller, so it does not import torch before the first resize.
"""

import time
from typing import Any

from train.distributed.ray_train_internals import ControllerCallback
from train.loop.run_directory import Run

# How long a resize waits for the requested checkpoint.
CHECKPOINT_WAIT_S = 60


class CheckpointBeforeResize(ControllerCallback):
    """Requests a checkpoint before a resize, for which Ray stops all workers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._running = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        # The first decision starts the workers, so there is nothing to save yet.
        if not self._running:
            self._running = True
            return
        steps = self._run.store(keep=1).steps()
        self._run.want_checkpoint()
        deadline = time.monotonic() + CHECKPOINT_WAIT_S
        while time.monotonic() < deadline and self._run.store(keep=1).steps()[-1:] == steps[-1:]:
            time.sleep(0.1)
        self._run.checkpoint_wanted(forget=True)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        # The workers have ended; the next decision starts them again.
        self._running = False
