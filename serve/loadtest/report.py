"""The results of a load test."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100}


class Outcome(IntEnum):
    """How a request ended.

    SHED: refused because of load, with 503 or 429. CLIENT_ERROR: another 4xx, or a redirect.
    """

    OK = 0
    SHED = 1
    CLIENT_ERROR = 2
    SERVER_ERROR = 3
    TIMEOUT = 4
    CONNECTION_ERROR = 5


# A finished request: when it was due, when it ended, its outcome, whether the response had
# Retry-After, and how often it was retried.
Done = tuple[float, float, Outcome, bool, int]


def classify(status: int) -> Outcome:
    """Return the outcome of a response with an HTTP status."""
    if 200 <= status < 300:
        return Outcome.OK
    if status in (429, 503):
        return Outcome.SHED
    return Outcome.SERVER_ERROR if status >= 500 else Outcome.CLIENT_ERROR


@dataclass(frozen=True)
class LoadTestReport:
    """Figures of all requests that were due in the measured time, each followed to its end.

    Latency counts from when a request was due, not from when it was sent, so that a stall of the
    server also counts for the requests that waited. A timeout counts as its timeout, although the
    response would have taken longer. ok_per_s: successful responses that arrived in the measured
    time, per second. failed_after_retries: requests among `retried` that did not succeed. sent: all
    requests, including the warm-up's. send_lag_p99_ms: how late the client itself sent requests;
    None for a closed loop. client_us_per_request: processor time of the client's process, in
    microseconds. latencies_ms, ok_latencies_ms, shed_latencies_ms: float64 [N], ascending, of
    successes and timeouts, of successes, and of refused requests. answered_s: float64 [N], times of
    the successful responses, seconds since the end of the warm-up.
    """

    load: str
    duration_s: float
    requests: int
    offered_per_s: float
    ok_per_s: float
    ok: int
    shed: int
    shed_with_retry_after: int
    client_errors: int
    server_errors: int
    timeouts: int
    connection_errors: int
    retried: int
    failed_after_retries: int
    sent: int
    connections_opened: int
    send_lag_p99_ms: float | None
    client_cpu_s: float
    client_us_per_request: float
    latencies_ms: np.ndarray
    ok_latencies_ms: np.ndarray
    shed_latencies_ms: np.ndarray
    answered_s: np.ndarray

    @classmethod
    def of(
        cls,
        done: Sequence[Done],
        *,
        load: str,
        start_s: float,
        duration_s: float,
        lags_s: Sequence[float] = (),
        connections_opened: int = 0,
        client_cpu_s: float = 0.0,
    ) -> "LoadTestReport":
        """Return the report of finished requests. start_s: end of the warm-up, by their clock."""
        table = np.array(done, np.float64).reshape(-1, 5)
        is_ok_N = table[:, 2] == Outcome.OK
        came_s = table[is_ok_N, 1] - start_s
        answered_s = np.sort(came_s[(came_s >= 0) & (came_s < duration_s)])
        end_s = start_s + duration_s
        due_s, ended_s, outcome_N, told_N, retries_N = table[
            (table[:, 0] >= start_s) & (table[:, 0] < end_s)
        ].T
        latencies_ms = 1e3 * (ended_s - due_s)
        ok_N, shed_N, retried_N = outcome_N == Outcome.OK, outcome_N == Outcome.SHED, retries_N > 0
        counts = np.bincount(outcome_N.astype(int), minlength=len(Outcome)).tolist()
        return cls(
            load=load,
            duration_s=duration_s,
            requests=len(due_s),
            offered_per_s=round(len(due_s) / duration_s, 2),
            ok_per_s=round(len(answered_s) / duration_s, 2),
            ok=counts[Outcome.OK],
            shed=counts[Outcome.SHED],
            shed_with_retry_after=int(np.sum(shed_N & (told_N > 0))),
            client_errors=counts[Outcome.CLIENT_ERROR],
            server_errors=counts[Outcome.SERVER_ERROR],
            timeouts=counts[Outcome.TIMEOUT],
            connection_errors=counts[Outcome.CONNECTION_ERROR],
            retried=int(np.sum(retried_N)),
            failed_after_retries=int(np.sum(retried_N & ~ok_N)),
            sent=len(done),
            connections_opened=connections_opened,
            send_lag_p99_ms=round(float(np.percentile(lags_s, 99)) * 1e3, 3) if lags_s else None,
            client_cpu_s=round(client_cpu_s, 3),
            client_us_per_request=round(1e6 * client_cpu_s / max(1, len(done)), 1),
            latencies_ms=np.sort(latencies_ms[ok_N | (outcome_N == Outcome.TIMEOUT)]),
            ok_latencies_ms=np.sort(latencies_ms[ok_N]),
            shed_latencies_ms=np.sort(latencies_ms[shed_N]),
            answered_s=answered_s,
        )

    @property
    def latency_ms(self) -> dict[str, float] | None:
        """Mean and percentiles of successful responses and timeouts; None without any."""
        if not len(self.latencies_ms):
            return None
        mean = float(np.mean(self.latencies_ms))
        return {"mean": round(mean, 3)} | {
            name: round(float(np.percentile(self.latencies_ms, percent)), 3)
            for name, percent in PERCENTILES.items()
        }

    @property
    def shed_p99_ms(self) -> float | None:
        """99th percentile latency of refused requests; None without any."""
        if not len(self.shed_latencies_ms):
            return None
        return round(float(np.percentile(self.shed_latencies_ms, 99)), 3)

    def within(self, bound_ms: float) -> int:
        """Return how many successful responses took at most `bound_ms` milliseconds."""
        return int(np.searchsorted(self.ok_latencies_ms, bound_ms, side="right"))

    def holds(self, bound_ms: float, min_ok: float = 0.99) -> bool:
        """Return whether at least `min_ok` of all requests succeeded within `bound_ms`."""
        return self.requests > 0 and self.within(bound_ms) >= min_ok * self.requests

    def as_dict(self, bound_ms: float | None = None) -> dict[str, Any]:
        """Return the figures for JSON; with a bound, also how many responses were within it."""
        arrays = ("latencies_ms", "ok_latencies_ms", "shed_latencies_ms", "answered_s")
        figures = {name: value for name, value in vars(self).items() if name not in arrays}
        figures |= {"latency_ms": self.latency_ms, "shed_p99_ms": self.shed_p99_ms}
        if bound_ms is not None:
            figures["within"] = {"ms": bound_ms, "ok": self.within(bound_ms)}
        return figures

    def table(self, bound_ms: float | None = None) -> str:
        """Return the figures as a text table."""
        latency_ms = self.latency_ms or {}
        lines = {
            "load": f"{self.load}, {self.duration_s:g} s",
            "requests": f"{self.requests:,} ({self.offered_per_s:,.1f}/s)",
            "ok": f"{self.ok:,} ({self.ok_per_s:,.1f}/s)",
        }
        if bound_ms is not None:
            share = self.within(bound_ms) / max(1, self.requests)
            lines["in time"] = f"{self.within(bound_ms):,} within {bound_ms:g} ms ({share:.2%})"
        shed = f", {self.shed_with_retry_after:,} with Retry-After, p99 {self.shed_p99_ms} ms"
        lines |= {
            "shed": f"{self.shed:,}{shed if self.shed else ''}",
            "errors": f"{self.client_errors:,} client, {self.server_errors:,} server, "
            f"{self.timeouts:,} timeouts, {self.connection_errors:,} connections",
            "retried": f"{self.retried:,}, {self.failed_after_retries:,} of them failed",
            "latency ms": "  ".join(f"{name} {value:.2f}" for name, value in latency_ms.items()),
            "client": f"{self.client_us_per_request:.0f} µs of processor time per request, "
            f"{self.connections_opened:,} connections opened",
        }
        if self.send_lag_p99_ms is not None:
            lines["client"] += f", p99 of send lag {self.send_lag_p99_ms:.2f} ms"
        return "\n".join(f"{name:<11} {line}" for name, line in lines.items())
