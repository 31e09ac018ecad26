"""The data plane: the one path from records to predictions that every protocol takes."""

import asyncio
from collections.abc import Sequence

import numpy as np

from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound, TimedOut
from train.bundle import Predictor
from train.bundle.manifest import Manifest
from train.tasks import Arrays, InvalidRecord, Record
from train.tasks.records import stack

# More than this is left to a thread: it would hold up every other request.
MAX_INLINE_BYTES = 65_536
MAX_INLINE_ROWS = 64


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
            async with asyncio.timeout(self._timeout_s):
                rows = await self._encoded(records)
                return await self._batcher.submit(rows)
        except InvalidRecord as error:
            raise BadRequest(str(error)) from error
        except TimeoutError:
            raise TimedOut(f"no answer within {self._timeout_s:g} s; try again later.") from None

    async def _encoded(self, records: Sequence[Record]) -> Arrays:
        """Encode in a thread what has to be decoded: a small file may hold a large image."""
        ready = len(records) <= MAX_INLINE_ROWS and all(
            isinstance(value, np.ndarray) and value.nbytes <= MAX_INLINE_BYTES
            for record in records
            for value in record.values()
        )
        return self._encode(records) if ready else await asyncio.to_thread(self._encode, records)

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
