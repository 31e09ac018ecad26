"""Waiting for a cluster that is in use: said once.

Ray Train asks for its workers again each minute, and logs a traceback each time.
"""

import logging
from typing import Any

from train.distributed.ray_train_internals import (
    START_LOGGERS,
    ControllerCallback,
    WorkerGroupStartupTimeoutError,
)


class LogWaitingOnce(ControllerCallback):
    """For Ray Train's controller, in whatever process that runs."""

    def __init__(self, *, said: bool) -> None:
        """said: whether the user knows already that the workers are waited for."""
        self._said = said

    def after_controller_start(self, train_run_context: Any) -> None:
        once = OnceFilter(said=self._said)
        for name in START_LOGGERS:
            logging.getLogger(name).addFilter(once)


class OnceFilter(logging.Filter):
    """Lets one line through for all tries that end for lack of room, and what else is logged."""

    def __init__(self, *, said: bool) -> None:
        super().__init__()
        self._said = said
        self._again = False

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage()
        if isinstance(error, WorkerGroupStartupTimeoutError) or "startup timed out" in text:
            said, self._said, self._again = self._said, True, True
            record.msg, record.args = "waiting until the cluster has room for the workers", ()
            record.exc_info = record.exc_text = None
            return not said
        # Each further try is announced like the first.
        return not (self._again and text.startswith("Attempting to start training worker group"))
