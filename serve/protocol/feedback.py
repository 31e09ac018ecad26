"""Feedback as a client sends it."""

from dataclasses import dataclass
from typing import Any

import orjson

from serve.errors import BadRequest

EXPECTED = 'expected {"id": "x-request-id of a response", "truth": [a label for each record]}'


@dataclass(frozen=True)
class Feedback:
    """Labels for the records of a request. client: whose request it is, where that is given."""

    request_id: str
    truths: list[Any]
    client: str | None


def decode(body: bytes, max_rows: int) -> Feedback:
    """Return the feedback in a JSON body. Raises BadRequest; also for more than `max_rows`."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error}); {EXPECTED}.") from error
    if not isinstance(given, dict) or given.keys() - {"client"} != {"id", "truth"}:
        raise BadRequest(f"the body is another object; {EXPECTED}.")
    truths = given["truth"]
    if not isinstance(given["id"], str) or not isinstance(truths, list):
        raise BadRequest(f"'id' must be a text and 'truth' a list; {EXPECTED}.")
    if len(truths) > max_rows:
        raise BadRequest(f"'truth' has {len(truths)} values; a request has at most {max_rows}.")
    if not isinstance(given.get("client", ""), str):
        raise BadRequest("'client' must be the name of the key that asked.")
    return Feedback(given["id"], truths, given.get("client"))
