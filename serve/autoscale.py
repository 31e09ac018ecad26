"""How many replicas: by the rows in progress, which is what a batching engine is busy with.

Requests in progress, as Ray Serve counts them, say little here: one may hold a thousand rows, and
many small ones fit into one batch.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.config import ServeConfig
from serve.profile import Profile

ROWS = "rows"
# How often replicas report, and over how long their reports are averaged.
REPORT_S, LOOK_BACK_S = 0.5, 2.0
# Batches in progress that are no backlog: one in the engine, one that fills.
BATCHES = 2


def target_rows(config: ServeConfig, profile: Profile) -> int:
    """Rows in progress that a replica has at its full throughput."""
    return config.target_rows or BATCHES * (config.max_batch_rows or profile.best_rows)


def desired_replicas(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ray Serve's policy: (replicas wanted, state). Bounds and delays are applied by Serve."""
    reports = (context.aggregated_metrics or {}).get(ROWS, {})
    alive = [rows for replica, rows in reports.items() if replica in context.running_replicas]
    # What waits at Serve's own proxy, where there is no replica yet.
    rows = sum(alive) + context.total_queued_requests
    return rows / context.config.target_ongoing_requests, {}


def options(config: ServeConfig, profile: Profile) -> dict[str, Any]:
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
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            policy=AutoscalingPolicy(policy_function="serve.autoscale:desired_replicas"),
        )
    }
