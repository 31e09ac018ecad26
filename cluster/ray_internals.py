"""All uses of names that are not part of Ray's public interface.

Written for Ray 2.60. `tests/test_ray_internals.py` uses each of these names, so that a version of
Ray without one fails there. Ray reads its environment on import, so the functions here import it
only when they are called.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def address_file() -> Path:
    """Return the file in which Ray stores the address of the cluster on this machine."""
    from ray._common.utils import get_ray_address_file

    return Path(get_ray_address_file(None))


def gcs_channel(address: str) -> Any:
    """Return a gRPC channel to the GCS at HOST:PORT that sends Ray's token."""
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address)


def reload_environment() -> None:
    """Make Ray read the environment again, because variables may be newer than Ray's import."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


@contextmanager
def loopback() -> Iterator[None]:
    """Make a node that is started in the block use the loopback address, as on macOS and Windows.

    Nodes that this process starts later use the machine's address.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def patient_start(timeout_s: float) -> Iterator[None]:
    """Let Ray's node take `timeout_s` seconds to start, instead of Ray's constant of 30.

    Ray checks its limit only between calls of `get_node`, which fails until the node has
    registered. In the block, `get_node` itself retries until then.
    """
    import psutil
    from ray._private import services

    get_node = services.get_node

    def is_starting() -> bool:
        return any("raylet" in child.name() for child in psutil.Process().children())

    def wait_for_node(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return get_node(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline or not is_starting():
                    raise
            time.sleep(0.2)

    services.get_node = wait_for_node
    try:
        yield
    finally:
        services.get_node = get_node


def is_worker() -> bool:
    """Return whether this process is one of Ray's workers rather than a driver."""
    import ray
    from ray._private.worker import global_worker

    return bool(global_worker.mode == ray.WORKER_MODE)


def session_log_folder() -> Path:
    """Return the folder in which Ray's processes on this machine write their logs."""
    from ray._private import worker

    return Path(worker._global_node.get_logs_dir_path())


def silence_workers() -> None:
    """Stop printing the output of Ray's workers."""
    from ray._private import ray_logging, worker

    ray_logging.global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    worker.print_to_stdstream = lambda data, **options: None


class KeyValueStore:
    """A namespace of Ray's key-value store, which the GCS keeps in memory."""

    def __init__(self, namespace: bytes) -> None:
        self._namespace = namespace

    def put(self, key: str, value: bytes) -> None:
        """Store a value under a key, and replace an earlier one."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key, value, namespace=self._namespace)

    def pop(self, prefix: str) -> Iterator[bytes]:
        """Yield the values whose keys begin with a prefix, in order of the keys; delete each."""
        from ray.experimental import internal_kv

        for key in sorted(internal_kv._internal_kv_list(prefix, namespace=self._namespace)):
            value = internal_kv._internal_kv_get(key, namespace=self._namespace)
            internal_kv._internal_kv_del(key, namespace=self._namespace)
            yield value
