"""The access log: one line of JSON per request, written in a thread."""

import asyncio
import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

import orjson

logger = logging.getLogger(__name__)

FLUSH_S = 0.5
FILE_BYTES, FILES = 64 * 2**20, 5
# Lines that are buffered while the disk is slower than the requests; more are dropped and counted.
MAX_LINES = 100_000

Level = Literal["all", "errors", "none"]


class PrivateFileHandler(RotatingFileHandler):
    """Writes files that only their owner can read; a file is created with its first line."""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=files, delay=True)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)

        def private(name: str, flags: int) -> int:
            return os.open(name, flags, 0o600)

        stream = open(  # noqa: SIM115 - the handler closes it
            self.baseFilename, self.mode, encoding=self.encoding, opener=private
        )
        # A file of an older server may exist with other permissions.
        os.fchmod(stream.fileno(), 0o600)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:
        # logging calls this while it handles an exception; raising it again passes it to the
        # caller instead of printing it to stderr.
        raise


class AccessLog:
    """Buffers lines and writes them every FLUSH_S seconds. Belongs to one event loop."""

    def __init__(self, path: Path, level: Level) -> None:
        self._level = level
        self._lines: list[dict[str, Any]] = []
        self._dropped = 0
        self._due = False
        self._logger = logging.Logger(f"halyard.access.{path}")
        if level != "none":
            self._logger.addHandler(PrivateFileHandler(path, FILE_BYTES, FILES))

    def add(self, status: int, line: dict[str, Any]) -> None:
        """Add the line of a request that was answered with an HTTP status."""
        if self._level == "none" or (self._level == "errors" and status < 400):
            return
        if len(self._lines) >= MAX_LINES:
            self._dropped += 1
            return
        self._lines.append(line)
        if not self._due:
            self._arm()

    def _flush(self) -> None:
        """Write the buffered lines in a thread; later lines are written afterwards."""
        lines, self._lines = self._lines, []
        if self._dropped:
            lines.append({"dropped": self._dropped})
            self._dropped = 0
        writing = asyncio.get_running_loop().run_in_executor(None, self._write, lines)
        writing.add_done_callback(self._written)

    def _written(self, writing: "asyncio.Future[None]") -> None:
        self._due = False
        if writing.exception() is not None:
            logger.error("the access log cannot be written: %s", writing.exception())
        if self._lines:
            self._arm()

    def _arm(self) -> None:
        self._due = True
        asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._logger.info("%s", b"\n".join(map(orjson.dumps, lines)).decode())
