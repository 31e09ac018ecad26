"""What a request can be answered besides a prediction, each with its HTTP status."""


class RequestError(Exception):
    """A request that gets no prediction. The message says why and, where it helps, what to do."""

    status = 500
    headers: dict[str, str] = {}  # noqa: RUF012


class BadRequest(RequestError):
    status = 400


class NotFound(RequestError):
    status = 404


class BodyTooLarge(RequestError):
    status = 413


class Overloaded(RequestError):
    status = 503
    headers = {"Retry-After": "1"}  # noqa: RUF012


class TimedOut(RequestError):
    status = 504
