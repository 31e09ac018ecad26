"""Metadata, configuration and statistics of the server and of a model, in the V2 protocol."""

from typing import Any

from serve.config import ServeConfig
from serve.inference.dataplane import DataPlane
from serve.protocol import v2
from serve.telemetry.metrics import INFERENCE, Histogram
from train.bundle.manifest import FORMAT_VERSION, TensorMetadata


def server_metadata() -> dict[str, Any]:
    """Return the server's name, version and protocol extensions."""
    return {"name": "halyard", "version": str(FORMAT_VERSION), "extensions": v2.EXTENSIONS}


def model_metadata(plane: DataPlane, versions: list[str]) -> dict[str, Any]:
    """Return a model's versions, inputs and outputs."""
    manifest = plane.manifest
    return {
        "name": plane.name,
        "versions": versions,
        "platform": manifest.variants[plane.variant].engine,
        "inputs": [tensor.model_dump() for tensor in manifest.inputs],
        "outputs": [tensor.model_dump() for tensor in manifest.outputs],
        "parameters": {"variant": plane.variant, "version": plane.version},
    }


def model_config(plane: DataPlane, serving: ServeConfig) -> dict[str, Any]:
    """Return a model's configuration in the form that perf_analyzer reads."""
    manifest = plane.manifest
    microseconds = int(serving.batching.wait_ms * 1000)
    return {
        "name": plane.name,
        "platform": manifest.variants[plane.variant].engine,
        "backend": manifest.variants[plane.variant].engine,
        "max_batch_size": serving.limits.max_rows,
        "input": [_tensor(tensor) for tensor in manifest.inputs],
        "output": [_tensor(tensor) for tensor in manifest.outputs],
        "dynamic_batching": {
            "preferred_batch_size": [plane.batcher.max_batch_rows],
            "max_queue_delay_microseconds": microseconds,
            "priority_levels": serving.limits.priorities,
            "default_priority_level": (serving.limits.priorities + 1) // 2,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": int(serving.limits.timeout_s * 1e6),
                "allow_timeout_override": True,
                "max_queue_size": serving.limits.max_queue_rows,
            },
        },
        "response_cache": {"enable": serving.cache.max_bytes > 0},
    }


def model_statistics(plane: DataPlane) -> dict[str, Any]:
    """Return this replica's request counts and total durations (nanoseconds) since it started."""
    metrics = plane.metrics
    succeeded = sum(
        count
        for (protocol, status), count in metrics.requests.items()
        if protocol in INFERENCE and status < 400
    )
    total = metrics.stages["total"]
    return {
        "name": plane.name,
        "version": plane.version,
        "inference_count": metrics.rows,
        "execution_count": metrics.batch_rows.count,
        "inference_stats": {
            "success": {"count": succeeded, "ns": int(total.sum * 1e9)},
            "fail": {"count": sum(metrics.refused.values()), "ns": 0},
            "queue": _duration(metrics.stages["queue"]),
            "compute_input": _duration(metrics.stages["parse"]),
            "compute_infer": _duration(metrics.stages["engine"]),
            "compute_output": _duration(metrics.stages["reply"]),
            "cache_hit": {"count": metrics.cache["hit"], "ns": 0},
            "cache_miss": {"count": metrics.cache["miss"], "ns": 0},
        },
    }


def _tensor(tensor: TensorMetadata) -> dict[str, Any]:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": tensor.shape[1:] or [1]}


def _duration(histogram: Histogram) -> dict[str, int]:
    return {"count": histogram.count, "ns": int(histogram.sum * 1e9)}
