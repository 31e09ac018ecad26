"""The options of a request: its deadline, its priority and its client."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import BadRequest, abbreviated

# Longest stored name of a client, in characters.
MAX_CLIENT = 64


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of a request, after the server's limits are applied.

    deadline: seconds on the event loop's clock. priority: 1 is the most urgent. client: the client
    whose share of the engine the request uses.
    """

    deadline: float
    priority: int = 1
    client: str = ""


def request_options(
    parameters: Mapping[str, Any],
    *,
    now: float,
    timeout_s: float,
    priorities: int,
    client: str,
    asked_s: float | None = None,
) -> RequestOptions:
    """Read the protocol's `timeout` (microseconds) and `priority` (0 or none: the middle level).

    now: seconds on the event loop's clock. timeout_s: the server's limit. asked_s: seconds until
    the client's own deadline; None if there is none. Raises BadRequest if a parameter is invalid.
    """
    limit_s = timeout_s if asked_s is None else min(timeout_s, max(asked_s, 0))
    microseconds = parameters.get("timeout")
    if microseconds is not None:
        if type(microseconds) is not int or microseconds < 0:
            raise BadRequest(
                f"parameter 'timeout' is {abbreviated(microseconds)}; expected microseconds as an "
                "integer of at least 0."
            )
        if microseconds:
            limit_s = min(limit_s, microseconds / 1_000_000)
    priority = parameters.get("priority") or (priorities + 1) // 2
    if type(priority) is not int or not 1 <= priority <= priorities:
        raise BadRequest(
            f"parameter 'priority' is {abbreviated(priority)}; expected an integer from 0 to "
            f"{priorities}."
        )
    return RequestOptions(now + limit_s, priority, client[:MAX_CLIENT])
