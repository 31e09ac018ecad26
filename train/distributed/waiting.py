"""Report only once that a run waits for a cluster that is in use.

Ray Train requests its workers again every minute and logs a traceback each time.
"""

import logging
from typing import Any

from train.distributed.ray_train_internals import (
    START_LOGGERS,
    ControllerCallback,
    WorkerGroupStartupTimeoutError,
)


class LogWaitingOnce(ControllerCallback):
    """Installs `OnceFilter` in the process of Ray Train's controller."""

    def __init__(self, *, said: bool) -> None:
        """said: whether it was already reported that the run waits for workers."""
        self._said = said

    def after_controller_start(self, train_run_context: Any) -> None:
        once = OnceFilter(said=self._said)
        for name in START_LOGGERS:
            logging.getLogger(name).addFilter(once)


class OnceFilter(logging.Filter):
    """Passes one line for all attempts that fail for lack of resources, and all other records."""

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
        # Ray announces each further attempt like the first; these lines are dropped.
        return not (self._again and text.startswith("Attempting to start training worker group"))
