"""Large bodies: decoded in a thread, one at a time, while the event loop answers others.

What is JSON of them goes to a process of its own, see json_process.py.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from serve.errors import Overloaded

T = TypeVar("T")

# Smaller bodies are decoded at once; a thread would take longer.
INLINE_BYTES = 1 << 18


class LargeBodyDecoder:
    """Belongs to one event loop."""

    def __init__(self, max_waiting_bytes: int) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._turn = asyncio.Lock()

    async def decode(self, decode: Callable[[], T], size: int, parsed: int) -> T:
        """Return what `decode` makes of a body of `size` bytes.

        parsed: bytes of it that are parsed at most. Raises Overloaded where too many wait, and what
        `decode` raises.
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
