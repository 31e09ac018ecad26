"""Feedback as a client sends it."""

from typing import Any

import orjson

from serve.errors import BadRequest

EXPECTED = 'expected {"id": "x-request-id of an answer", "truth": [what is true of each record]}'


def decode(body: bytes) -> tuple[str, list[Any]]:
    """Return the request's id and a truth for each of its records. Raises BadRequest."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error}); {EXPECTED}.") from error
    if not isinstance(given, dict) or given.keys() != {"id", "truth"}:
        raise BadRequest(f"the body is another object; {EXPECTED}.")
    truths = given["truth"]
    if not isinstance(given["id"], str) or not isinstance(truths, list):
        raise BadRequest(f"'id' must be a text and 'truth' a list; {EXPECTED}.")
    return given["id"], truths
