"""Join a running Ray cluster, or start a lean one on this machine."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster import auth, private, ray_internals
from cluster.errors import CommandFailed, UserError
from cluster.ingress import certificates
from cluster.nodes import node_checks
from cluster.ray_address import answers, forget_ended, wrong_token

REPOSITORY = Path(__file__).resolve().parents[1]

# How long the processes of a node may take to start. Ray's own 30 s are not enough on a machine
# whose cores are taken by other work.
START_S = 180

# Read by Ray when it is imported or started, so set before either. Each may be overridden from
# outside.
ENVIRONMENT = {
    # Whoever reaches a port of Ray can run code there; see `cluster.auth`. Where this is not set,
    # the clients of jobs and of Serve send no token.
    auth.MODE: "token",
    **private.NO_TELEMETRY,
    # Without GPUs asked for, leave CUDA_VISIBLE_DEVICES as it is (Ray's own future default).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray gives its workers the least of the cores (15): beside other work they would stand still.
    "RAY_worker_niceness": "0",
    # So would their start fail: Ray waits a minute for one that it has started.
    "RAY_worker_register_timeout_seconds": str(START_S),
    "RAY_gcs_server_port_wait_time_s": str(START_S),
    # Workers report once an epoch; a shorter poll than the default 2 s ends a run sooner.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}

# Where it is 0, Ray takes the loopback address for its node, as it does on macOS and Windows.
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# Starting one worker per core ahead of need takes the cores from the work itself.
LEAN_RAYLET = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


# When a user is told what a start waits for.
PATIENCE_S = 10
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_local = False


def set_ray_environment() -> None:
    """Set Ray's environment variables that are not set already."""
    private.set_privacy_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def local_environment() -> dict[str, str]:
    """What a Ray that starts on this machine alone needs besides ENVIRONMENT.

    Raises CommandFailed.
    """
    return {
        ON_LOOPBACK: "0",
        "RAY_TMPDIR": _temporary(),
    }


def _temporary() -> str:
    """Where a Ray of this machine alone keeps the folder of its sessions.

    Ray lets every user of the machine write in it; the default keeps them out.
    """
    return os.environ.get("RAY_TMPDIR") or str(private.private_folder("ray").parent)


def connect(
    *,
    num_cpus: int | None = None,
    dashboard: bool = False,
    metrics: bool = True,
    logs: bool = True,
) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine, bound to loopback.

    Inside a `ray job` RAY_ADDRESS is set by Ray. Does nothing when already connected.
    From the main thread: the processes that a local Ray starts end with the thread.

    num_cpus: least that a local Ray offers, whose count is otherwise the machine's.
    metrics: whether a local Ray measures itself, which takes a few hundredths of a core.
    logs: whether what other processes print appears here.

    Raises UserError where no cluster answers at RAY_ADDRESS, or one of another Ray or Python, or
    one with another token; Failed where Ray does not start here.
    """
    set_ray_environment()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": logs, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        if not answers(address):
            tls = "" if certificates.nodes_speak_tls() else " without TLS (RAY_USE_TLS is not set)"
            raise UserError(
                f"RAY_ADDRESS is {address}, where no Ray answers{tls}; start it there, or unset "
                "RAY_ADDRESS to start Ray on this machine."
            )
        with _sigterm_kept():
            _join(address, **options)
        return
    global _local
    _local = True
    # This machine is not taken away with notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    options |= {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, num_cpus or 1),
        "include_dashboard": dashboard,
        "_temp_dir": str(Path(_temporary()) / "ray"),
        "_system_config": {**LEAN_RAYLET, "enable_metrics_collection": metrics},
    }
    # Ray has read ON_LOOPBACK on import, before it is set; its processes read it again.
    with _sigterm_kept(), ray_internals.loopback(), _set(ON_LOOPBACK, "0"):
        _start(lambda: ray.init(**options))


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Put this process's handler of SIGTERM back, in whose place Ray puts ones that abort."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def import_ray_data() -> ModuleType:
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

    Raises UserError where no cluster answers at RAY_ADDRESS, and as `connect` does.
    """
    set_ray_environment()
    if address := os.environ.get("RAY_ADDRESS"):
        connect()
        return address != "local"
    address = forget_ended()
    if not address or address.rpartition(":")[0] in LOOPBACK:
        return False
    _join(address, logging_level=logging.WARNING)
    return True


def _start(init: Callable[[], Any]) -> None:
    """Start Ray on this machine; once more, where its processes were not up in time.

    Raises CommandFailed when that fails too.
    """
    import ray

    auth.ensure_token()
    ray_internals.reload_environment()
    for again in (False, True):
        try:
            with _told("Ray to start on this machine"), ray_internals.patient_start(START_S):
                init()
            return
        except Exception as error:  # Ray raises plain ones here
            ray.shutdown()
            reason = " ".join(str(error).split())[:200]
            if again:
                raise CommandFailed(f"Ray does not start on this machine: {reason}") from error
            print(f"Ray did not start ({reason}); trying once more.", file=sys.stderr)


def check_port_free(host: str, port: int) -> None:
    """Raises UserError if something listens on a port that a server is to use."""
    if node_checks.port_is_taken(host, port):
        raise UserError(
            f"port {port} is taken by another program; stop that one first "
            f"(ss -ltnp 'sport = :{port}' names it), or give another port."
        )


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for the processes that the block starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say on stderr, once and after a while, what the block waits for."""
    words = f"waiting for {what}; other work takes its cores"
    timer = threading.Timer(PATIENCE_S, print, [words], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _join(address: str, **options: Any) -> None:
    """Raises UserError where the cluster cannot be joined, such as one of another Ray."""
    import ray

    auth.ensure_token()
    ray_internals.reload_environment()
    try:
        ray.init(address=address, **options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(wrong_token(address)) from error
    except ConnectionError as error:
        raise UserError(f"the cluster at {address} cannot be joined: {error}") from error
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
