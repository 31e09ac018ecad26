"""Decoding of feedback requests."""

from dataclasses import dataclass
from typing import Any

import orjson

from serve.errors import BadRequest

EXPECTED = 'expected {"id": "x-request-id of a response", "truth": [a label for each record]}'


@dataclass(frozen=True)
class Feedback:
    """True labels for the records of an earlier request.

    client: name of the key that sent that request; None if not given.
    """

    request_id: str
    truths: list[Any]
    client: str | None


def decode(body: bytes, max_rows: int) -> Feedback:
    """Decode a JSON body. Raises BadRequest if it is malformed or has over `max_rows` labels."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON ({error}); {EXPECTED}.") from error
    if not isinstance(given, dict) or given.keys() - {"client"} != {"id", "truth"}:
        raise BadRequest(f"the body is not a feedback object; {EXPECTED}.")
    truths = given["truth"]
    if not isinstance(given["id"], str) or not isinstance(truths, list):
        raise BadRequest(f"'id' must be a string and 'truth' a list; {EXPECTED}.")
    if len(truths) > max_rows:
        raise BadRequest(f"'truth' has {len(truths)} values; at most {max_rows} are accepted.")
    if not isinstance(given.get("client", ""), str):
        raise BadRequest("'client' must be a string: the name of the key that sent the request.")
    return Feedback(given["id"], truths, given.get("client"))
