"""The command `python -m serve.loadtest URL [options]`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import UserError
from serve.loadtest import target as targets
from serve.loadtest.client import run_load
from serve.loadtest.load import ClosedLoad, Load, PoissonLoad
from serve.loadtest.report import LoadTestReport
from serve.loadtest.search import find_rate
from serve.loadtest.target import LoadTarget

CLOSED_CONNECTIONS, OPEN_CONNECTIONS = 32, 512
MAX_SHOWN = 300


class LoadTestOptions(CommandOptions):
    """Send load to an HTTP inference server and report throughput, latency and errors."""

    model_config = SettingsConfigDict(cli_prog_name="python -m serve.loadtest")

    url: CliPositionalArg[str] = Field(description="URL of the server, http://HOST:PORT.")
    connections: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Without --rate, a closed loop: connections that each send the next request "
        f"after the response to the last (default {CLOSED_CONNECTIONS}). With --rate: maximum open "
        f"connections (default {OPEN_CONNECTIONS}).",
    )
    rate: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Requests per second, as Poisson arrivals that do not wait for responses. With "
        "--find-rate, the rate to start from.",
    )
    duration: float = Field(10, gt=0, le=86_400, description="Measured time in seconds.")
    warmup: float = Field(
        3, ge=0, le=3600, description="Seconds of load before the measured time, not reported."
    )
    timeout: float = Field(
        10, gt=0, le=3600, description="Seconds after which a request counts as a timeout."
    )
    retry: int = Field(
        0, ge=0, le=100, description="Retries of a request after a failed connection or a 503."
    )
    seed: int = Field(0, ge=0, description="Random seed of arrivals and of request contents.")
    p99: float | None = Field(
        None,
        gt=0,
        description="Latency bound in milliseconds: successful responses within it are counted. "
        "Required by --find-rate.",
    )
    find_rate: bool = Field(
        False,
        description="Find the highest Poisson rate at which 99 % of all requests succeed within "
        "--p99.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="Model to send random requests to; default: the only one in /v2/models.",
    )
    rows: int = Field(1, ge=1, le=100_000, description="Rows of random values in each request.")
    pool: int = Field(
        64, ge=1, le=10_000, description="Number of different random requests, sent in turn."
    )
    path: str | None = Field(
        None,
        description="Path to request instead of a model's, for other servers: POST with --body, "
        "otherwise GET.",
    )
    body: list[Path] = Field(
        [], description="File to post to --path. May be repeated; the files are sent in turn."
    )
    content_type: str = Field(targets.BYTES, description="Content-Type of --body.")
    header: list[str] = Field(
        [], description='Header "Name: value" of each request. May be repeated.'
    )
    api_key: str | None = Field(None, description="API key, sent as 'Authorization: Bearer KEY'.")
    picture: Path | None = Field(
        None, description="PNG file to write plots of latency and throughput to."
    )


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command; return the figures that it prints. Raises UserError and CommandFailed."""
    options = parse(argv)
    target = _target(options)
    status, answer = targets.send_first(target, options.timeout)
    if not 200 <= status < 300:
        shown = " ".join(answer.decode(errors="replace").split())[:MAX_SHOWN]
        _tell(f"warning: the first response has status {status}: {shown}")
    if options.find_rate:
        return _find_rate(options, target)
    report = _measure(options, target, _load(options))
    _show(options, report)
    return report.as_dict(options.p99)


def parse(argv: Sequence[str]) -> LoadTestOptions:
    """Return the options of a command line. Raises UserError, which names the invalid option."""
    options = parse_options(LoadTestOptions, argv, verbatim=("--body", "--header"))
    _check(options)
    return options


def _check(options: LoadTestOptions) -> None:
    """Raise UserError for options that cannot be combined."""
    targets.split_url(options.url)
    if options.find_rate and options.p99 is None:
        raise UserError("--find-rate needs a latency bound: give --p99 MILLISECONDS.")
    if options.body and options.path is None:
        raise UserError("--body needs a path to post to: give --path, such as /predict.")
    if options.path is not None and not options.path.startswith("/"):
        raise UserError(f"--path is '{options.path[:100]}'; it must begin with /.")
    if options.path is not None and options.model is not None:
        raise UserError("give either --model or, for another kind of server, --path; not both.")
    # Checked before the run, so that a mistake does not cost its results.
    drawn = options.picture
    if drawn is not None and not (drawn.suffix == ".png" and drawn.parent.is_dir()):
        raise UserError(f"--picture is '{drawn}'; expected a .png file in an existing folder.")


def _target(options: LoadTestOptions) -> LoadTarget:
    headers = _headers(options)
    if options.path is None:
        model = options.model or targets.served_model(options.url, headers, options.timeout)
        requests = targets.infer_requests(
            options.url,
            model,
            headers,
            num_requests=options.pool,
            rows=options.rows,
            seed=options.seed,
            timeout_s=options.timeout,
        )
        return LoadTarget(options.url, requests)
    bodies: list[bytes | None] = [_read(path) for path in options.body]
    kind = options.content_type
    return LoadTarget(
        options.url,
        [
            targets.build_request(
                options.url, options.path, body=body, content_type=kind, headers=headers
            )
            for body in bodies or [None]
        ],
    )


def _headers(options: LoadTestOptions) -> dict[str, str]:
    headers = {}
    for line in options.header:
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or any(mark in line for mark in "\r\n"):
            raise UserError(f"--header is '{line[:100]}'; expected \"Name: value\".")
        headers[name.strip()] = value.strip()
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    return headers


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--body: '{path}' cannot be read: {error.strerror}.") from error


def _load(options: LoadTestOptions) -> Load:
    if options.rate is None:
        return ClosedLoad(options.connections or CLOSED_CONNECTIONS)
    return PoissonLoad(options.rate, options.connections or OPEN_CONNECTIONS)


def _measure(options: LoadTestOptions, target: LoadTarget, load: Load) -> LoadTestReport:
    return run_load(
        target,
        load,
        warmup_s=options.warmup,
        duration_s=options.duration,
        timeout_s=options.timeout,
        retries=options.retry,
        seed=options.seed,
    )


def _find_rate(options: LoadTestOptions, target: LoadTarget) -> dict[str, Any]:
    assert options.p99 is not None
    connections = options.connections or OPEN_CONNECTIONS
    search = find_rate(
        lambda rate_per_s: _measure(options, target, PoissonLoad(rate_per_s, connections)),
        options.p99,
        options.rate or 100,
        _tell,
    )
    if search.best is None:
        _tell(f"at no rate did 99 % of the requests succeed within {options.p99:g} ms")
        return {"find_rate": search.as_dict()}
    _show(options, search.best)
    return {**search.best.as_dict(options.p99), "find_rate": search.as_dict()}


def _show(options: LoadTestOptions, report: LoadTestReport) -> None:
    _tell(report.table(options.p99))
    if options.picture is not None:
        # Imported here because matplotlib takes half a second and most runs draw nothing.
        from serve.loadtest import plot

        plot.plot_load_test(report, options.picture, options.p99)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
