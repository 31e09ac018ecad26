"""Join a running Ray cluster, or start a lean one on this machine."""

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]

# Read by Ray when it is imported or started, so set before either. Each may be overridden from
# outside.
ENVIRONMENT = {
    # Unset, a local Ray turns token auth on while the job and Serve clients send no token.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without GPUs asked for, leave CUDA_VISIBLE_DEVICES as it is (Ray's own future default).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Workers report once an epoch; a shorter poll than the default 2 s ends a run sooner.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}

# Starting one worker per core ahead of need takes the cores from the work itself.
LEAN_RAYLET = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


LOOPBACK = ("127.0.0.1", "localhost", "::1")

_local = False


def prepare_environment() -> None:
    """Set Ray's environment variables that are not set already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(
    *,
    num_cpus: int | None = None,
    dashboard: bool = False,
    metrics: bool = True,
    logs: bool = True,
) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine, bound to loopback.

    Raises UserError where that cluster has another Ray or Python.

    Inside a `ray job` RAY_ADDRESS is set by Ray. Does nothing when already connected.
    From the main thread: the processes that a local Ray starts end with the thread.
    num_cpus: least that a local Ray offers, whose count is otherwise the machine's.
    metrics: whether a local Ray measures itself, which takes a few hundredths of a core.
    logs: whether what other processes print appears here.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": logs, "logging_level": logging.WARNING}
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address, **options)
        return
    from ray._private import ray_constants

    global _local
    _local = True
    # Ray then takes the loopback address for its node, as it does on macOS and Windows. It reads
    # the variable on import, which may have been before this.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # This machine is not taken away with notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, num_cpus or 1),
        include_dashboard=dashboard,
        _system_config={**LEAN_RAYLET, "enable_metrics_collection": metrics},
        **options,
    )


def ray_data() -> ModuleType:
    """Ray Data, without its bars and without a word on each of its plans."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data


def is_local() -> bool:
    """Whether `connect` started the Ray that this process is connected to."""
    return _local


def join_running() -> bool:
    """Join the cluster at RAY_ADDRESS or the one that runs on this machine, if there is any.

    A Ray on loopback belongs to the command that started it and is left alone.
    """
    prepare_environment()
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if not address or ("RAY_ADDRESS" not in os.environ and address.split(":")[0] in LOOPBACK):
        return False
    try:
        _join(address, logging_level=logging.WARNING)
    except ConnectionError:
        return False
    return True


def _join(address: str, **options: Any) -> None:
    """Raises UserError where the cluster has another Ray or Python, or wants a token."""
    import ray

    try:
        ray.init(address=address, **options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"the cluster at {address} asks for a token. Set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH where it is not in ~/.ray/auth_token."
        ) from error
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if "Version mismatch" in words:
            raise UserError(f"{words} Use the same versions here as on the cluster.") from error
        raise


def disconnect() -> None:
    """Leave the cluster; a local Ray that `connect` started stops with it."""
    import ray

    global _local
    _local = False
    ray.shutdown()
