"""The audit log: who changed what is served, when, and from where; a JSON object on a line.

Under the storage path, as the repository that writes it may run on any node of a cluster.
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
# How far back a decision is searched for that may have been written before a crash.
TAIL_BYTES = 2**20
# What a rollout decides, nobody asked for.
ROLLOUT = Actor("rollout", "", "")


class AuditLog:
    """The changes of one model. Written at once; what cannot be written is in the server's log."""

    def __init__(self, root: str, model: str) -> None:
        """root: where models are stored. Where that is a URL, whose files take no further lines,
        they are in the server's own log only.
        """
        self._model = model
        self._logger: logging.Logger | None = None
        self._path: Path | None = None
        if not storage.is_url(root):
            self._path = path = Path(root, FOLDER, f"{model}.jsonl")
            self._logger = logging.Logger(f"halyard.audit.{path}")
            self._logger.addHandler(PrivateFileHandler(path, FILE_BYTES, FILES))

    async def contains(self, action: str, **details: Any) -> bool:
        """Whether a line with an action and details is among the last ones.

        Raises OSError. Where the lines are in the server's own log only, it is never known.
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
            with suppress(ValueError):  # the first may be cut off
                found.append({key: str(value) for key, value in json.loads(line).items()})
        return found

    async def add(self, action: str, actor: Actor, outcome: str, **details: Any) -> None:
        """action: load, unload, feedback, or what a rollout decided of a candidate.

        outcome: "done", or why not.
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
