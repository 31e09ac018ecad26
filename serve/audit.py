"""The audit log: all changes to served models, with their client, time and address, as JSON lines.

It is stored under the storage path, because the repository that writes it may run on any node.
"""

import asyncio
import json
import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import storage
from serve.access import Actor
from serve.telemetry.access_log import PrivateFileHandler

logger = logging.getLogger(__name__)

FOLDER = "audit"
FILE_BYTES, FILES = 64 * 2**20, 10
# Bytes at the end of the log that are searched for a decision written before a crash.
TAIL_BYTES = 2**20
# The actor of changes by rollouts, which no client requested.
ROLLOUT = Actor("rollout", "", "")


class AuditLog:
    """The audit log of one model. Lines that cannot be written go to the server's log."""

    def __init__(self, root: str, model: str) -> None:
        """Open the log.

        root: the storage path. If it is a URL, whose files cannot be appended to, the lines go only
        to the server's log.
        """
        self._model = model
        self._logger: logging.Logger | None = None
        self._path: Path | None = None
        if not storage.is_url(root):
            self._path = path = Path(root, FOLDER, f"{model}.jsonl")
            self._logger = logging.Logger(f"halyard.audit.{path}")
            self._logger.addHandler(PrivateFileHandler(path, FILE_BYTES, FILES))

    async def contains(self, action: str, **details: Any) -> bool:
        """Return whether one of the last lines has this action and these details.

        It is always false if the lines are only in the server's log. Raises OSError if the log
        cannot be read.
        """
        wanted = {"action": action, **details}.items()
        return any(wanted <= line.items() for line in await asyncio.to_thread(self._last_lines))

    def _last_lines(self) -> list[dict[str, Any]]:
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # the first line may be cut off
                found.append({key: str(value) for key, value in json.loads(line).items()})
        return found

    async def add(self, action: str, actor: Actor, outcome: str, **details: Any) -> None:
        """Add a line.

        action: load, unload, feedback, or a rollout's decision about a candidate. outcome: "done",
        or why the change failed.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "action": action,
            "model": self._model,
            "client": actor.name,
            "address": actor.address,
            "request": actor.request_id,
            "outcome": outcome,
            **details,
        }
        content = json.dumps(line)
        if action != "feedback" or self._logger is None:
            logger.warning("audit: %s", content)
        if self._logger is None:
            return
        try:
            await asyncio.to_thread(self._logger.info, "%s", content)
        except OSError as error:
            logger.error("the audit log cannot be written (%s): %s", error, content)
