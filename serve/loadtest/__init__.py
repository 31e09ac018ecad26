"""Load tests of HTTP inference servers: throughput, latency, refused and failed requests.

`python -m serve.loadtest URL [options]`, or from Python:

    request = build_request(url, "/predict", body=image, content_type="image/png")
    report = run_load(LoadTarget(url, [request]), PoissonLoad(rate_per_s=200), duration_s=10)
    print(report.ok_per_s, report.latency_ms["p99"])
"""

from serve.loadtest.client import run_load
from serve.loadtest.load import ClosedLoad, Load, PoissonLoad
from serve.loadtest.report import LoadTestReport, Outcome
from serve.loadtest.search import RateSearch, find_rate
from serve.loadtest.target import LoadTarget, build_request, send_first

__all__ = [
    "ClosedLoad",
    "Load",
    "LoadTarget",
    "LoadTestReport",
    "Outcome",
    "PoissonLoad",
    "RateSearch",
    "build_request",
    "find_rate",
    "run_load",
    "send_first",
]
