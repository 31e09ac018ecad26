"""The errors with which a request can end, each with its HTTP status.

RequestError
├── BadRequest 400
├── Unauthorized 401, Forbidden 403
├── NotFound 404
├── MethodNotAllowed 405
├── RequestTimeout 408
├── PayloadTooLarge 413
├── UnsupportedMediaType 415
├── ClientDisconnected 499         the client does not wait for a response any more
└── RetryableError                 has a Retry-After header
    ├── RateLimited 429
    ├── Overloaded 503
    ├── Unavailable 503
    └── DeadlineExceeded 504
"""

import math
from collections.abc import Sequence
from typing import Any


def abbreviated(value: Any, limit: int = 40) -> str:
    """Return the beginning of a value of a request, for an error message."""
    try:
        return str(value)[:limit]
    except RecursionError:
        return "nested too deeply"


class RequestError(Exception):
    """The base of all errors of requests. Messages go to clients: they give the cause and a remedy.

    status: HTTP status. reason: label of the error in metrics.
    """

    status = 500
    reason = "error"

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of the response, in addition to those of every response."""
        return {}


class BadRequest(RequestError):
    """The request is malformed or does not match the model."""

    status, reason = 400, "bad_request"


class Unauthorized(RequestError):
    """The request has no valid key."""

    status, reason = 401, "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(RequestError):
    """The key or the page that sent the request does not allow it."""

    status, reason = 403, "forbidden"


class NotFound(RequestError):
    """There is no such path, model, version or earlier request."""

    status, reason = 404, "not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but not with this HTTP method."""

    status, reason = 405, "bad_method"

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self._allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": ", ".join(self._allowed)}


class RequestTimeout(RequestError):
    """The body did not arrive in time."""

    status, reason = 408, "slow_body"


class PayloadTooLarge(RequestError):
    """The request exceeds a limit on bytes, rows or pixels."""

    status, reason = 413, "too_large"


class UnsupportedMediaType(RequestError):
    """The body has an unsupported content encoding or character set."""

    status, reason = 415, "unsupported_media_type"


class ClientDisconnected(RequestError):
    """The client disconnected before the response was sent."""

    status, reason = 499, "client_gone"


class RetryableError(RequestError):
    """An error after which the client may retry.

    retry_after_s: seconds until a retry is likely to succeed. The header Retry-After has whole
    seconds, rounded up.
    """

    def __init__(self, message: str, retry_after_s: float = 1, reason: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason or type(self).reason

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class RateLimited(RetryableError):
    """The key has exceeded its rate limit."""

    status, reason = 429, "rate"


class Overloaded(RetryableError):
    """The server has no capacity for the request."""

    status, reason = 503, "overloaded"


class Unavailable(RetryableError):
    """The model is unloaded, or the registry or storage cannot be reached."""

    status, reason = 503, "unavailable"


class DeadlineExceeded(RetryableError):
    """The request did not finish by its deadline."""

    status, reason = 504, "timeout"
