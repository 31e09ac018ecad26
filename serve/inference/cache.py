"""The cache of predictions, both finished and being computed."""

import asyncio
import hashlib
import sys
from collections.abc import Awaitable, Callable

from cachetools import TTLCache

from serve.errors import DeadlineExceeded
from serve.telemetry.metrics import VersionMetrics
from train.tasks import Arrays

# Approximate memory of an entry without its arrays.
OVERHEAD_BYTES = 500


class ResponseCache:
    """A cache with least-recently-used eviction and a time to live. Belongs to one event loop."""

    def __init__(
        self, max_bytes: int, ttl_s: float, identity: str, metrics: VersionMetrics
    ) -> None:
        """Set the limits. identity: the bundle's digest and the variant, part of every key."""
        self._kept: TTLCache[bytes, Arrays] = TTLCache(max_bytes, ttl_s, getsizeof=_size_bytes)
        self._in_flight: dict[bytes, asyncio.Future[Arrays | None]] = {}
        self._identity = identity.encode()
        self._counts = metrics.cache

    @property
    def size_bytes(self) -> float:
        return self._kept.currsize

    async def answer(
        self, rows: Arrays, deadline: float, compute: Callable[[], Awaitable[Arrays]]
    ) -> Arrays:
        """Return the predictions that `compute` returns for `rows`, from the cache if possible.

        rows: input → array of shape [N, …]. Concurrent calls with equal rows compute once; if that
        call fails or is cancelled, another one computes. deadline: of this call, in seconds on the
        event loop's clock. Raises the errors of `compute`, and DeadlineExceeded.
        """
        key = self._key(rows)
        while True:
            if (kept := self._kept.get(key)) is not None:
                self._counts["hit"] += 1
                return kept
            shared = self._in_flight.get(key)
            if shared is None:
                self._counts["miss"] += 1
                return await self._computed(key, compute)
            try:
                async with asyncio.timeout_at(deadline):
                    found = await asyncio.shield(shared)
            except TimeoutError:
                late = "the request did not finish in time and was cancelled."
                raise DeadlineExceeded(late) from None
            if found is not None:
                self._counts["shared"] += 1
                return found

    async def _computed(self, key: bytes, compute: Callable[[], Awaitable[Arrays]]) -> Arrays:
        shared = self._in_flight[key] = asyncio.get_running_loop().create_future()
        found: Arrays | None = None
        try:
            found = await compute()
        finally:
            # After a failure `found` is None; one of the waiting calls then computes.
            del self._in_flight[key]
            shared.set_result(found)
        if _size_bytes(found) <= self._kept.maxsize:
            # A copy, because views of a batch would keep the whole batch in memory.
            self._kept[key] = {name: array.copy() for name, array in found.items()}
        return found

    def _key(self, rows: Arrays) -> bytes:
        digest = hashlib.blake2b(self._identity, digest_size=20)
        for name, array in rows.items():
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.data if array.flags.c_contiguous else array.tobytes())
        return digest.digest()


def _size_bytes(answers: Arrays) -> int:
    values = sum(array.nbytes for array in answers.values())
    words = sum(
        sys.getsizeof(value)
        for array in answers.values()
        if array.dtype == object
        for value in array.ravel()
    )
    return OVERHEAD_BYTES + values + words
