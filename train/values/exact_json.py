"""JSON parsing that keeps all digits of integers."""

import json
import re
from typing import Any

import orjson

# 64-bit integers have at most 20 digits. orjson parses longer ones as floats, so texts with 20 or
# more digits in a row are parsed by json instead.
LONG_NUMBER = re.compile(rb"[0-9]{20}")


def loads_exact(text: bytes | memoryview) -> Any:
    """Parse JSON with integers of any size. Raises ValueError if the text is not JSON."""
    value = orjson.loads(text)
    return json.loads(bytes(text)) if LONG_NUMBER.search(text) else value
