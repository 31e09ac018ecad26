"""Metrics of a replica in the form of Prometheus.

Histograms have the same bounds on all replicas, so that a percentile across replicas is
histogram_quantile(0.99, sum by (le) (rate(…_bucket[1m]))). Only one event loop writes them, so they
need no locks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

PREFIX = "halyard_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30),
)
ROWS = tuple(2**power for power in range(13))
# Protocols of predictions; the protocol of all other requests is "http".
INFERENCE = ("v1", "v2", "grpc")
STAGES = ("parse", "queue", "batch", "engine", "reply", "total")

# A family as plain data: its type, its help, and (suffix, labels, value) of each sample.
Family = tuple[str, str, list[tuple[str, dict[str, str], float]]]
Snapshot = dict[str, Family]


class Histogram:
    """Counts of values in bins. bounds: upper bounds of the bins, inclusive, ascending."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def add(self, other: "Histogram") -> None:
        """Add the counts of another histogram with the same bounds."""
        self._counts = [own + its for own, its in zip(self._counts, other._counts, strict=True)]
        self.sum += other.sum

    def quantile(self, share: float) -> float:
        """Return the quantile of a fraction `share`, interpolated linearly within its bin.

        The result is at most the last bound.
        """
        rank, below, low = share * self.count, 0, 0.0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            if count and below + count >= rank:
                return low + (bound - low) * (rank - below) / count
            below, low = below + count, bound
        return low

    def samples(self, labels: dict[str, str]) -> Iterable[tuple[str, dict[str, str], float]]:
        """Yield the samples of a Prometheus histogram: (suffix, labels, value)."""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            le = "+Inf" if bound == float("inf") else repr(float(bound))
            yield "_bucket", {**labels, "le": le}, total
        yield "_count", labels, total
        yield "_sum", labels, self.sum


class VersionMetrics:
    """Counters and histograms of one version of a model on one replica."""

    def __init__(self) -> None:
        self.stages = {stage: Histogram(SECONDS) for stage in STAGES}
        self.batch_rows = Histogram(ROWS)
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refused: Counter[str] = Counter()
        self.cache: Counter[str] = Counter()
        self.rows = 0
        self.positions: Counter[str] = Counter()
        self.long_rows = 0
        self.engine_s = 0.0

    def sealed(self, rows: int, waited_s: Iterable[float]) -> None:
        """Count a batch of `rows` rows. waited_s: how long each of its requests was queued."""
        self.rows += rows
        self.batch_rows.observe(rows)
        queue = self.stages["queue"]
        for seconds in waited_s:
            queue.observe(seconds)

    def padded(self, values: int, positions: int) -> None:
        """Count a batch of rows that differ in length: its values, and positions with padding."""
        self.positions["values"] += values
        self.positions["padding"] += positions - values

    def ran(self, handed_over_s: float, engine_s: float, requests: int) -> None:
        """Count the run of a batch, whose times count for each of its `requests` requests.

        handed_over_s: seconds from the seal to the engine. engine_s: seconds in the engine.
        """
        self.engine_s += engine_s
        self.stages["batch"].observe(handed_over_s, requests)
        self.stages["engine"].observe(engine_s, requests)

    def answered(self, protocol: str, status: int, total_s: float) -> None:
        """Count an answered request. total_s: seconds from its first byte to the response."""
        self.requests[protocol, status] += 1
        if protocol in INFERENCE:
            self.stages["total"].observe(total_s)

    def snapshot(
        self, labels: dict[str, str], *, queue_rows: int = 0, cache_bytes: float = 0
    ) -> Snapshot:
        """Return all metrics. labels: of every sample, such as model, version and replica.

        queue_rows, cache_bytes: current values of these gauges.
        """

        def counted(
            name: str, counts: Mapping[Any, int]
        ) -> list[tuple[str, dict[str, str], float]]:
            return [("_total", {**labels, name: str(key)}, n) for key, n in counts.items()]

        stages = [
            sample
            for stage, histogram in self.stages.items()
            for sample in histogram.samples({**labels, "stage": stage})
        ]
        requests = [
            ("_total", {**labels, "protocol": protocol, "status": str(status)}, float(count))
            for (protocol, status), count in self.requests.items()
        ]
        return {
            "request_seconds": (
                "histogram",
                "Seconds of requests by stage; total is from the first byte to the response.",
                stages,
            ),
            "batch_rows": (
                "histogram",
                "Rows per batch of the engine.",
                list(self.batch_rows.samples(labels)),
            ),
            "requests": ("counter", "Requests answered, by protocol and status.", requests),
            "refused": (
                "counter",
                "Requests refused, by reason, such as deadline or queue_full.",
                counted("reason", self.refused),
            ),
            "rows": ("counter", "Rows run by the engine.", [("_total", labels, self.rows)]),
            "positions": (
                "counter",
                "Positions of texts and other lists run by the engine: with values, or padding.",
                counted("content", self.positions),
            ),
            "long_rows": (
                "counter",
                "Rows with at least text.max_tokens tokens; further tokens were cut off.",
                [("_total", labels, self.long_rows)],
            ),
            "engine_seconds": (
                "counter",
                "Seconds for which the engine was busy.",
                [("_total", labels, self.engine_s)],
            ),
            "queue_rows": ("gauge", "Rows waiting in the queue.", [("", labels, queue_rows)]),
            "cache": (
                "counter",
                "Cache lookups by outcome; shared: computed for an identical request in progress.",
                counted("outcome", self.cache),
            ),
            "cache_bytes": ("gauge", "Size of the cache in bytes.", [("", labels, cache_bytes)]),
        }


def merge_samples(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Return the samples of several replicas or versions together, distinguished by labels."""
    result: Snapshot = {}
    for snapshot in snapshots:
        for name, (kind, words, samples) in snapshot.items():
            result.setdefault(name, (kind, words, []))[2].extend(samples)
    return result


def filter_models(snapshot: Snapshot, sees: Callable[[str], bool]) -> Snapshot:
    """Return the samples of the models for which `sees(label "model")` is true.

    The label is "" for samples that belong to no model.
    """
    return {
        name: (kind, words, [sample for sample in samples if sees(sample[1].get("model", ""))])
        for name, (kind, words, samples) in snapshot.items()
    }


def exposition(snapshot: Snapshot) -> bytes:
    """Return metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot))
    return generate_latest(registry)


class _Families:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        for name, (kind, words, samples) in self._snapshot.items():
            metric = Metric(PREFIX + name, words, kind)
            for suffix, labels, value in samples:
                metric.add_sample(PREFIX + name + suffix, labels, value)
            yield metric
