"""JSON whose whole numbers keep all of their digits."""

import json
import re
from typing import Any

import orjson

# Of 64 bits a whole number has at most twenty digits; orjson makes longer ones floating-point.
LONG_NUMBER = re.compile(rb"[0-9]{20}")


def loads_exact(text: bytes | memoryview) -> Any:
    """Parse JSON. Raises ValueError."""
    value = orjson.loads(text)
    return json.loads(bytes(text)) if LONG_NUMBER.search(text) else value
