"""The number of replicas, by the waiting rows and the utilization of the running replicas.

The number of requests in progress, which Ray Serve uses, is a poor measure: one request may have a
thousand rows, and many small ones fit into one batch. Rows alone are not enough either: a fully
busy replica has requests in its socket buffers that it has not read and does not count.
"""

import time
from collections.abc import Callable
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.config import ServeConfig
from serve.inference.latency_model import LatencyModel

ROWS, BUSY = "rows", "busy"
# Seconds between the reports of a replica, and seconds over which reports are averaged.
REPORT_S, LOOK_BACK_S = 0.5, 2.0
# Batches in progress that are not a backlog: one in the engine and one that is filling.
BATCHES = 2
# Utilization above which replicas are added.
TARGET_BUSY = 0.7


class Utilization:
    """The utilization of a replica's event loop or of its engine, whichever is higher.

    Call it on the event loop's thread, whose CPU time it measures.
    """

    def __init__(
        self,
        engine_s: Callable[[], float],
        answers: Callable[[], int],
        refused: Callable[[], int] = lambda: 0,
    ) -> None:
        """Set the counters, which return totals since the replica started.

        engine_s: seconds that the engine was busy, including the running batch. answers: number of
        responses. refused: number of requests rejected because of the load.
        """
        self._engine_s, self._answers, self._refused = engine_s, answers, refused
        self._last = self._now()

    def share(self) -> float:
        """Return the utilization since the last call, 0..1.

        It is 1 if requests were rejected, because they would have kept the replica busy, and 0 if
        there was no response, although an idle event loop also uses some time.
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
    """Return the number of rows in progress at which a replica has its full throughput."""
    return config.autoscaling.target_rows or BATCHES * (
        config.batching.max_rows or profile.best_rows
    )


def desired_replicas(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the desired number of replicas and an empty state: the policy for Ray Serve.

    Serve applies the bounds and delays.
    """
    reports = context.aggregated_metrics or {}

    def total(name: str) -> float:
        alive = context.running_replicas
        return sum(value for who, value in reports.get(name, {}).items() if who in alive)

    # Requests that wait at Serve's own proxy because there is no replica are in no report.
    rows = total(ROWS) + context.total_queued_requests
    return max(rows / context.config.target_ongoing_requests, total(BUSY) / TARGET_BUSY), {}


def scaling_options(config: ServeConfig, profile: LatencyModel) -> dict[str, Any]:
    """Return the options of the deployment that set its number of replicas."""
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
