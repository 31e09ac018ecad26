"""How many replicas: by the rows that wait, and by how busy those are that there are.

Requests in progress, as Ray Serve counts them, say little here: one may hold a thousand rows, and
many small ones fit into one batch. Rows alone say too little as well: what a replica that is busy
all the time has not yet read waits where nobody counts it.
"""

import time
from collections.abc import Callable
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.config import ServeConfig
from serve.inference.latency_model import LatencyModel

ROWS, BUSY = "rows", "busy"
# How often replicas report, and over how long their reports are averaged.
REPORT_S, LOOK_BACK_S = 0.5, 2.0
# Batches in progress that are no backlog: one in the engine, one that fills.
BATCHES = 2
# A replica that is busier than this gets help.
TARGET_BUSY = 0.7


class Utilization:
    """The share of time for which a replica works: its event loop, or its engine if that is more.

    To be called on the event loop's thread.
    """

    def __init__(
        self,
        engine_s: Callable[[], float],
        answers: Callable[[], int],
        refused: Callable[[], int] = lambda: 0,
    ) -> None:
        """engine_s: for how long the engine was busy until now, with the batch that runs. answers:
        how many there were. refused: how many requests were, for lack of time or room."""
        self._engine_s, self._answers, self._refused = engine_s, answers, refused
        self._last = self._now()

    def share(self) -> float:
        """Since it was asked last, 0..1; 0 if it answered nothing, though it never quite rests.

        1 if it refused requests: they would have kept it busy.
        """
        before, self._last = self._last, self._now()
        wall_s, loop_s, engine_s, answers, refused = (
            new - old for new, old in zip(self._last, before, strict=True)
        )
        if refused:
            return 1.0
        if not engine_s and not answers:
            return 0.0
        return min(max(loop_s, engine_s, 0.0) / max(wall_s, 1e-6), 1.0)

    def _now(self) -> tuple[float, ...]:
        counts = float(self._answers()), float(self._refused())
        return time.monotonic(), time.thread_time(), self._engine_s(), *counts


def target_rows(config: ServeConfig, profile: LatencyModel) -> int:
    """Rows in progress that a replica has at its full throughput."""
    return config.autoscaling.target_rows or BATCHES * (
        config.batching.max_rows or profile.best_rows
    )


def desired_replicas(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ray Serve's policy: (replicas wanted, state). Bounds and delays are applied by Serve."""
    reports = context.aggregated_metrics or {}

    def total(name: str) -> float:
        alive = context.running_replicas
        return sum(value for who, value in reports.get(name, {}).items() if who in alive)

    # What waits at Serve's own proxy, where there is no replica yet, is in no report.
    rows = total(ROWS) + context.total_queued_requests
    return max(rows / context.config.target_ongoing_requests, total(BUSY) / TARGET_BUSY), {}


def scaling_options(config: ServeConfig, profile: LatencyModel) -> dict[str, Any]:
    """Return the deployment's options that say how many replicas it has."""
    least, most = config.replica_range
    if least == most:
        return {"num_replicas": least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            initial_replicas=max(least, 1),
            target_ongoing_requests=target_rows(config, profile),
            metrics_interval_s=REPORT_S,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=config.autoscaling.upscale_delay_s,
            downscale_delay_s=config.autoscaling.downscale_delay_s,
            policy=AutoscalingPolicy(policy_function="serve.control.autoscaling:desired_replicas"),
        )
    }
