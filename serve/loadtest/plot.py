"""Plots of one load test."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from serve.loadtest.report import LoadTestReport

SHARES = (0, 50, 90, 99, 99.9, 99.99)


def plot_load_test(report: LoadTestReport, path: Path, bound_ms: float | None = None) -> None:
    """Write a PNG: latency by percentile, latency histogram, successful responses over time.

    bound_ms: latency bound to mark, milliseconds.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    if len(report.latencies_ms):
        _percentiles(axes[0], report.latencies_ms)
        _histogram(axes[1], report.latencies_ms)
    _over_time(axes[2], report)
    if bound_ms is not None:
        axes[0].axhline(bound_ms, color="tab:red", linestyle="--")
        axes[1].axvline(bound_ms, color="tab:red", linestyle="--")
    figure.suptitle(f"{report.load}: {report.ok_per_s:,.1f} successful responses/s")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _percentiles(axes: Axes, latencies_ms: np.ndarray) -> None:
    count = len(latencies_ms)
    # Position on the axis, 1 / (1 - share): 1 at p0, 100 at p99.
    rarity_N = count / (count - np.arange(count))
    axes.plot(rarity_N, latencies_ms)
    axes.set(xscale="log", xlabel="percentile", ylabel="ms", title="Latency", ylim=(0, None))
    shown = [share for share in SHARES if 100 / (100 - share) <= count]
    axes.set_xticks([100 / (100 - share) for share in shown], [f"{share:g}" for share in shown])
    axes.minorticks_off()


def _histogram(axes: Axes, latencies_ms: np.ndarray) -> None:
    axes.hist(latencies_ms, bins=80, color="tab:orange")
    axes.set(xlabel="ms", ylabel="responses", title="Latency", yscale="log")


def _over_time(axes: Axes, report: LoadTestReport) -> None:
    num_bins = max(1, min(120, round(report.duration_s * 4)))
    counts, edges_s = np.histogram(report.answered_s, num_bins, (0, report.duration_s))
    axes.stairs(counts / np.diff(edges_s), edges_s, color="tab:green", fill=True)
    axes.set(xlabel="s after the warm-up", ylabel="1/s", title="Successful responses per second")
