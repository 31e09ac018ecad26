"""The target of a load test: a server's URL and complete HTTP requests, built before the run."""

import contextlib
import http.client
import json
import math
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np

from cluster.errors import CommandFailed, UserError
from train.values.records import DTYPES

JSON, BYTES = "application/json", "application/octet-stream"


@dataclass(frozen=True)
class LoadTarget:
    """A server and the requests to send.

    url: "http://HOST:PORT". requests: complete HTTP/1.1 requests, sent in turn.
    """

    url: str
    requests: Sequence[bytes]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        parts = split_url(self.url)
        assert parts.hostname is not None
        return parts.hostname, parts.port or (443 if self.tls else 80)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """TLS settings for an https URL; None for http."""
        return ssl.create_default_context() if split_url(self.url).scheme == "https" else None


EXAMPLE = "http://127.0.0.1:8000"


def split_url(url: str) -> SplitResult:
    """Return the parts of an HTTP or HTTPS URL. Raises UserError for anything else."""
    with contextlib.suppress(ValueError):  # of an invalid port
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    raise UserError(f"URL is '{url[:200]}'; expected http://HOST:PORT, such as {EXAMPLE}.")


def build_request(
    url: str,
    path: str,
    *,
    body: bytes | None = None,
    content_type: str = BYTES,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Return an HTTP/1.1 request for a path below the URL's: POST with a body, otherwise GET."""
    parts = split_url(url)
    lines = [f"{'GET' if body is None else 'POST'} {parts.path.rstrip('/')}{path} HTTP/1.1"]
    given = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*"}
    if body is not None:
        given |= {"Content-Type": content_type, "Content-Length": str(len(body))}
    lines += [f"{name}: {value}" for name, value in {**given, **(headers or {})}.items()]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def send_first(target: LoadTarget, timeout_s: float) -> tuple[int, bytes]:
    """Send the first request and return the status and body of the response.

    Raises CommandFailed if there is no response within timeout_s seconds.
    """
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection(target.address, timeout_s))
            if target.tls is not None:
                wrapped = target.tls.wrap_socket(connection, server_hostname=target.address[0])
                connection = stack.enter_context(wrapped)
            connection.sendall(target.requests[0])
            answer = stack.enter_context(http.client.HTTPResponse(connection))
            answer.begin()
            return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CommandFailed(
            f"no response from {target.url}: {reason.lower()}; is the server up?"
        ) from error


def served_model(url: str, headers: Mapping[str, str], timeout_s: float) -> str:
    """Return the name of a server's only model.

    Raises UserError if the server lists no model or several, CommandFailed if it does not respond.
    """
    answer = _get(url, "/v2/models", headers, timeout_s)
    models = answer.get("models") if answer else None
    if not isinstance(models, list) or not models:
        raise UserError(f"{url}/v2/models lists no models; give --model NAME or --path PATH.")
    if len(models) > 1:
        names = ", ".join(map(str, models))
        raise UserError(f"{url} serves {names}; choose one with --model NAME.")
    return str(models[0])


def infer_requests(
    url: str,
    model: str,
    headers: Mapping[str, str],
    *,
    num_requests: int,
    rows: int,
    seed: int,
    timeout_s: float,
) -> list[bytes]:
    """Return requests with random rows that fit a model's metadata (Open Inference Protocol).

    Raises UserError if there is no such model or it has an input of an unknown datatype,
    CommandFailed if the server does not respond.
    """
    path = f"/v2/models/{quote(model, safe='')}"
    metadata = _get(url, path, headers, timeout_s)
    if metadata is None:
        raise UserError(f"{url} has no model '{model}': a request for {path} failed.")
    draws = np.random.default_rng(seed)
    made = []
    for _ in range(num_requests):
        head, raw = _infer_body(metadata["inputs"], rows, draws)
        length = {"Inference-Header-Content-Length": str(len(head))} if raw else {}
        made.append(
            build_request(
                url,
                f"{path}/infer",
                body=head + raw,
                content_type=BYTES if raw else JSON,
                headers={**headers, **length},
            )
        )
    return made


def _infer_body(
    tensors: Sequence[Mapping[str, Any]], rows: int, draws: np.random.Generator
) -> tuple[bytes, bytes]:
    """Return the JSON of a request and the binary data that follows it."""
    inputs, raws = [], []
    for tensor in tensors:
        # The first dimension is the rows. Other free dimensions, given as -1, become 1; the height
        # of an image becomes its width.
        sizes = tensor["shape"][1:]
        free = sizes[1] if tensor["datatype"] == "UINT8" and len(sizes) == 3 else 1
        shape = [rows, *(free if size < 0 else size for size in sizes)]
        entry = {"name": tensor["name"], "shape": shape, "datatype": tensor["datatype"]}
        if tensor["datatype"] == "UINT8":
            raws.append(draws.bytes(math.prod(shape)))
            inputs.append({**entry, "parameters": {"binary_data_size": len(raws[-1])}})
        else:
            inputs.append({**entry, "data": random_values(tensor["datatype"], shape, draws)})
    return json.dumps({"inputs": inputs}).encode(), b"".join(raws)


def random_values(datatype: str, shape: Sequence[int], draws: np.random.Generator) -> list[Any]:
    """Return random values of a tensor, row-major. Raises UserError for an unknown datatype."""
    count = math.prod(shape)
    if datatype == "BYTES":
        # A date is valid for columns of dates, texts and categories (as an unseen name).
        days = np.datetime64("2000-01-01") + draws.integers(0, 10_000, count)
        return [str(day) for day in days]
    if datatype == "BOOL":
        return [bool(value) for value in draws.integers(0, 2, count)]
    if datatype.startswith("FP"):
        return [float(value) for value in draws.standard_normal(count).round(4)]
    if datatype not in DTYPES:
        raise UserError(
            f"an input has the datatype '{datatype}', for which random values are not supported; "
            "give --path PATH --body FILE instead."
        )
    return [int(value) for value in draws.integers(0, 100, count)]


def _get(
    url: str, path: str, headers: Mapping[str, str], timeout_s: float
) -> dict[str, Any] | None:
    """Return the JSON object at a path; None for an error. Raises CommandFailed as `send_first`."""
    asked = build_request(url, path, headers={"Connection": "close", **headers})
    status, body = send_first(LoadTarget(url, [asked]), timeout_s)
    try:
        answer = json.loads(body) if status == 200 else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
