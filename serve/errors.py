"""What a request can be answered besides a prediction, each with its HTTP status.

RequestError
├── BadRequest 400
├── Unauthorized 401, Forbidden 403
├── NotFound 404
├── MethodNotAllowed 405
├── RequestTimeout 408
├── PayloadTooLarge 413
├── UnsupportedMediaType 415
├── ClientDisconnected 499           nobody is there to be answered
└── RetryableError                 says when to come again
    ├── RateLimited 429
    ├── Overloaded 503
    ├── Unavailable 503
    └── DeadlineExceeded 504
"""

import math
from collections.abc import Sequence


class RequestError(Exception):
    """A request that gets no prediction. The message says why and, where it helps, what to do."""

    status = 500
    # What metrics count it as.
    reason = "error"

    @property
    def headers(self) -> dict[str, str]:
        return {}


class BadRequest(RequestError):
    status, reason = 400, "bad_request"


class Unauthorized(RequestError):
    status, reason = 401, "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(RequestError):
    status, reason = 403, "forbidden"


class NotFound(RequestError):
    status, reason = 404, "not_found"


class MethodNotAllowed(RequestError):
    status, reason = 405, "bad_method"

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self._allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": ", ".join(self._allowed)}


class RequestTimeout(RequestError):
    status, reason = 408, "slow_body"


class PayloadTooLarge(RequestError):
    status, reason = 413, "too_large"


class UnsupportedMediaType(RequestError):
    status, reason = 415, "unsupported_media_type"


class ClientDisconnected(RequestError):
    status, reason = 499, "client_gone"


class RetryableError(RequestError):
    """retry_after_s: when an answer is likely; rounded up to whole seconds, as HTTP has it."""

    def __init__(self, message: str, retry_after_s: float = 1, reason: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason or type(self).reason

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class RateLimited(RetryableError):
    status, reason = 429, "rate"


class Overloaded(RetryableError):
    status, reason = 503, "overloaded"


class Unavailable(RetryableError):
    status, reason = 503, "unavailable"


class DeadlineExceeded(RetryableError):
    status, reason = 504, "timeout"
