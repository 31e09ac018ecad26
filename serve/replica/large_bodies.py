"""Decoding of large bodies in a thread, one at a time, so that the event loop is not blocked.

Large JSON is decoded in a subprocess; see json_process.py.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from serve.errors import Overloaded

T = TypeVar("T")

# Bodies up to this many bytes are decoded on the event loop, which is faster than a thread.
INLINE_BYTES = 1 << 18


class LargeBodyDecoder:
    """Decodes small bodies at once and large ones in a thread. Belongs to one event loop."""

    def __init__(self, max_waiting_bytes: int) -> None:
        """Set the limit for the total size of large bodies that wait or are being decoded."""
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._turn = asyncio.Lock()

    async def decode(self, decode: Callable[[], T], size: int, parsed: int) -> T:
        """Call `decode` for a body of `size` bytes, and return its result.

        parsed: the most bytes of the body that may need parsing. Raises Overloaded if too many
        bytes wait, and the errors of `decode`.
        """
        if parsed <= INLINE_BYTES:
            return decode()
        if self._waiting_bytes + size > self._max_waiting_bytes:
            raise Overloaded("too many large requests are waiting.", 1, "pending_bytes")
        self._waiting_bytes += size
        try:
            async with self._turn:
                return await asyncio.to_thread(decode)
        finally:
            self._waiting_bytes -= size
