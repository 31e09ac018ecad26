"""The data plane: the one path from records to predictions that every protocol takes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.errors import BadRequest, NotFound, TimedOut
from train.bundle import Predictor
from train.bundle.manifest import Manifest
from train.tasks import Arrays, Columns, InvalidRecord

# More than this is left to a thread: it would hold up every other request.
MAX_INLINE_BYTES = 65_536


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
        self._images = predictor.task.features.images
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

    async def infer(self, columns: Columns) -> Arrays:
        """Return predictions, a row for each record.

        columns: every field of the model, with a value for each record.
        Raises BadRequest for a record that cannot be encoded, Overloaded, TimedOut.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                rows = await self._encoded(columns)
                return await self._batcher.submit(rows)
        except InvalidRecord as error:
            several = error.row is not None and len(next(iter(columns.values()))) > 1
            where = f"record {error.row}: " if several else ""
            raise BadRequest(f"{where}{error}") from error
        except TimeoutError:
            raise TimedOut(f"no answer within {self._timeout_s:g} s; try again later.") from None

    async def _encoded(self, columns: Columns) -> Arrays:
        """Encode in a thread what takes long: a small file may hold a large image."""
        encode = self._predictor.encode
        files = any(_is_list(columns[name]) for name in self._images)
        sizes = [_size_bytes(values) for values in columns.values()]
        if not files and sum(sizes) <= MAX_INLINE_BYTES:
            return encode(columns)
        return await asyncio.to_thread(encode, columns)


def _is_list(values: Sequence[Any] | np.ndarray) -> bool:
    """Whether each value is an object of its own, such as a file or a text."""
    return not isinstance(values, np.ndarray) or values.dtype == object


def _size_bytes(values: Sequence[Any] | np.ndarray) -> int:
    """About how much there is to encode."""
    if not _is_list(values):
        assert isinstance(values, np.ndarray)
        return values.nbytes
    return sum(len(value) if isinstance(value, str | bytes) else 64 for value in values)
