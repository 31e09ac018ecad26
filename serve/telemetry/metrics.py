"""Metrics of a replica, in Prometheus' terms.

Histograms have the same bounds everywhere, so that a percentile across replicas is
histogram_quantile(0.99, sum by (le) (rate(…_bucket[1m]))). One event loop writes them; a plain list
then does what a lock would.
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
# Protocols of predictions; what asks about the server or a model is "http".
INFERENCE = ("v1", "v2", "grpc")
STAGES = ("parse", "queue", "batch", "engine", "reply", "total")

# A family as plain data: its type, its help, and (suffix, labels, value) of each sample.
Family = tuple[str, str, list[tuple[str, dict[str, str], float]]]
Snapshot = dict[str, Family]


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def add(self, other: "Histogram") -> None:
        """Add what another one of the same bounds counted."""
        self._counts = [own + its for own, its in zip(self._counts, other._counts, strict=True)]
        self.sum += other.sum

    def quantile(self, share: float) -> float:
        """Where a share of the values are below: linear within a bin, at most the last bound."""
        rank, below, low = share * self.count, 0, 0.0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            if count and below + count >= rank:
                return low + (bound - low) * (rank - below) / count
            below, low = below + count, bound
        return low

    def samples(self, labels: dict[str, str]) -> Iterable[tuple[str, dict[str, str], float]]:
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            le = "+Inf" if bound == float("inf") else repr(float(bound))
            yield "_bucket", {**labels, "le": le}, total
        yield "_count", labels, total
        yield "_sum", labels, self.sum


class VersionMetrics:
    """What one version of a model counts."""

    def __init__(self) -> None:
        self.stages = {stage: Histogram(SECONDS) for stage in STAGES}
        self.batch_rows = Histogram(ROWS)
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refused: Counter[str] = Counter()
        self.cache: Counter[str] = Counter()
        self.rows = 0
        self.engine_s = 0.0

    def sealed(self, rows: int, waited_s: Iterable[float]) -> None:
        self.rows += rows
        self.batch_rows.observe(rows)
        queue = self.stages["queue"]
        for seconds in waited_s:
            queue.observe(seconds)

    def ran(self, handed_over_s: float, engine_s: float, requests: int) -> None:
        """A batch of that many requests ran; each of them took as long as the batch."""
        self.engine_s += engine_s
        self.stages["batch"].observe(handed_over_s, requests)
        self.stages["engine"].observe(engine_s, requests)

    def answered(self, protocol: str, status: int, total_s: float) -> None:
        self.requests[protocol, status] += 1
        if protocol in INFERENCE:
            self.stages["total"].observe(total_s)

    def snapshot(
        self, labels: dict[str, str], *, queue_rows: int = 0, cache_bytes: float = 0
    ) -> Snapshot:
        """labels: of every sample, such as model, version and replica."""

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
                "Time of requests by stage; total is from the first byte to the answer.",
                stages,
            ),
            "batch_rows": (
                "histogram",
                "Rows that the engine was given at once.",
                list(self.batch_rows.samples(labels)),
            ),
            "requests": ("counter", "Requests answered, by protocol and status.", requests),
            "refused": (
                "counter",
                "Requests refused, by reason.",
                counted("reason", self.refused),
            ),
            "rows": ("counter", "Rows answered by the engine.", [("_total", labels, self.rows)]),
            "engine_seconds": (
                "counter",
                "Time for which the engine was busy.",
                [("_total", labels, self.engine_s)],
            ),
            "queue_rows": ("gauge", "Rows that wait.", [("", labels, queue_rows)]),
            "cache": (
                "counter",
                "Lookups in the cache: hit, miss, or shared with one in flight.",
                counted("outcome", self.cache),
            ),
            "cache_bytes": ("gauge", "Size of the cache.", [("", labels, cache_bytes)]),
        }


def merge_samples(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Put the samples of several replicas or versions together; their labels keep them apart."""
    result: Snapshot = {}
    for snapshot in snapshots:
        for name, (kind, words, samples) in snapshot.items():
            result.setdefault(name, (kind, words, []))[2].extend(samples)
    return result


def filter_models(snapshot: Snapshot, sees: Callable[[str], bool]) -> Snapshot:
    """Keep the samples of some models. sees: by the label `model`, "" where it is of none."""
    return {
        name: (kind, words, [sample for sample in samples if sees(sample[1].get("model", ""))])
        for name, (kind, words, samples) in snapshot.items()
    }


def exposition(snapshot: Snapshot) -> bytes:
    """Return the text that Prometheus reads."""
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
