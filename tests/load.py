"""Send load to a server during a block of code, and summarize the outcomes of the requests."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from serve.loadtest import ClosedLoad, LoadTarget, LoadTestReport, PoissonLoad, run_load

READY_S = 120


@contextmanager
def meanwhile(
    target: LoadTarget, load: ClosedLoad | PoissonLoad, **options: Any
) -> Iterator[list[LoadTestReport]]:
    """Load the server while the block runs; the yielded list holds the report afterwards."""
    reports: list[LoadTestReport] = []
    thread = threading.Thread(target=lambda: reports.append(run_load(target, load, **options)))
    thread.start()
    try:
        yield reports
    finally:
        thread.join()


def failures(report: LoadTestReport) -> int:
    return (
        report.client_errors
        + report.server_errors
        + report.timeouts
        + report.connection_errors
        + report.shed
    )


def brief(report: LoadTestReport) -> dict[str, Any]:
    latency = report.latency_ms or {}
    return {
        "requests": report.requests,
        "ok_per_s": report.ok_per_s,
        "failed": failures(report),
        "shed": report.shed,
        "timeouts": report.timeouts,
        "server_errors": report.server_errors,
        "connection_errors": report.connection_errors,
        "retried": report.retried,
        "p50_ms": latency.get("p50"),
        "p99_ms": latency.get("p99"),
        "max_ms": latency.get("max"),
    }


def wait_for(condition: Callable[[], bool], seconds: float = READY_S) -> float:
    """Wait for a condition and return the seconds waited. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + seconds:
            raise TimeoutError("the server did not reach the expected state in time")
        time.sleep(0.05)
    return time.monotonic() - began
