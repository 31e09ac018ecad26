"""Load tests of HTTP inference servers: what a server gives, how late, and what it refuses.

`python -m serve.loadtest URL [options]`, or from Python:

    target = Target(url, [request(url, "/predict", body=image, content_type="image/png")])
    report = run(target, Poisson(rate_per_s=200), duration_s=10)
    print(report.ok_per_s, report.latency_ms["p99"])
"""

from serve.loadtest.client import run
from serve.loadtest.load import Closed, Load, Poisson
from serve.loadtest.report import Outcome, Report
from serve.loadtest.search import Search, find_rate
from serve.loadtest.target import Target, probe, request

__all__ = [
    "Closed",
    "Load",
    "Outcome",
    "Poisson",
    "Report",
    "Search",
    "Target",
    "find_rate",
    "probe",
    "request",
    "run",
]
