"""The data plane: the one path from records to predictions that every protocol takes."""

import asyncio
from collections.abc import Sequence
from typing import Any

from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound, TimedOut
from train.bundle import Predictor
from train.bundle.manifest import Manifest
from train.tasks import Arrays, InvalidRecord, Record
from train.tasks.records import stack

# Encoding above this is left to a thread: decoding a photo would hold up every other request.
MAX_INLINE_BYTES = 16_384


class DataPlane:
    """One model, one variant."""

    def __init__(self, predictor: Predictor, version: str, config: ServeConfig) -> None:
        self._predictor = predictor
        self._timeout_s = config.timeout_s
        self._batcher = Batcher(
            predictor.run,
            max_batch_rows=config.max_batch_rows,
            max_queue_rows=config.max_queue_rows,
        )
        self.version = version

    @property
    def manifest(self) -> Manifest:
        return self._predictor.bundle.manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def variant(self) -> str:
        return self._predictor.variant

    def check_name(self, name: str, version: str | None = None) -> None:
        """Raises NotFound for another model or version than the one served here."""
        if name != self.name:
            raise NotFound(f"model '{name[:100]}' is not served here; '{self.name}' is.")
        if version is not None and version != self.version:
            raise NotFound(
                f"version '{version[:100]}' of '{name}' is not served here; {self.version} is."
            )

    async def infer(self, records: Sequence[Record]) -> Arrays:
        """Return predictions, a row for each record.

        Raises BadRequest for a record that cannot be encoded, Overloaded, TimedOut.
        """
        try:
            size_bytes = sum(_size_bytes(value) for value in records[0].values()) * len(records)
            if size_bytes > MAX_INLINE_BYTES:
                rows = await asyncio.to_thread(self._encode, records)
            else:
                rows = self._encode(records)
        except InvalidRecord as error:
            raise BadRequest(str(error)) from error
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._batcher.submit(rows)
        except TimeoutError:
            raise TimedOut(f"no answer within {self._timeout_s:g} s; try again later.") from None

    def _encode(self, records: Sequence[Record]) -> Arrays:
        encoded = []
        for index, record in enumerate(records):
            try:
                encoded.append(self._predictor.encode(record))
            except InvalidRecord as error:
                if len(records) == 1:
                    raise
                raise InvalidRecord(f"record {index}: {error}") from error
        return stack(encoded)


def _size_bytes(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else 0
