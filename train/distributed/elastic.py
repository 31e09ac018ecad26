"""A checkpoint before the workers are torn down to be fewer or more.

Runs in Ray Train's controller, so it imports no torch until there is a resize.
"""

import time
from typing import Any

from train.distributed.ray_train_internals import ControllerCallback
from train.loop.run_directory import Run

# How long a resize waits for the checkpoint that it asked for.
CHECKPOINT_WAIT_S = 60


class CheckpointBeforeResize(ControllerCallback):
    """Ray tears the workers down to resize; this asks them for a checkpoint first."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._running = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        # The first decision starts the workers: there is nothing to keep yet.
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
        # The workers are gone; the next decision starts them again.
        self._running = False
