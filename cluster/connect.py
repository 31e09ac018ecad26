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

# Seconds that the processes of a node may take to start. Ray's own limit of 30 is too short on a
# busy machine.
START_S = 180

# Ray reads these when it is imported or started, so they are set before either. Values that are
# already in the environment take precedence.
ENVIRONMENT = {
    # Anyone who can reach one of Ray's ports can run code there; see `cluster.auth`. Without this
    # variable, Ray's clients for jobs and for Serve send no token.
    auth.MODE: "token",
    **private.NO_TELEMETRY,
    # Leave CUDA_VISIBLE_DEVICES unchanged for work without GPUs (Ray's own future default).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's default of 15 would starve its workers on a machine that also runs other programs.
    "RAY_worker_niceness": "0",
    # Ray's default of 60 s for the start of a worker is too short on a busy machine.
    "RAY_worker_register_timeout_seconds": str(START_S),
    "RAY_gcs_server_port_wait_time_s": str(START_S),
    # Workers report once per epoch; polling more often than the default of 2 s ends a run sooner.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}

# If it is 0, Ray uses the loopback address for its node, as it does on macOS and Windows.
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# By default, Ray starts one worker per core in advance, which slows down the work itself.
LEAN_RAYLET = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


# Seconds after which a message says what a start is waiting for.
PATIENCE_S = 10
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_local = False


def set_ray_environment() -> None:
    """Set the environment variables for Ray and for privacy that are not set already."""
    private.set_privacy_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def local_environment() -> dict[str, str]:
    """Return the variables that a Ray for this machine only needs in addition to ENVIRONMENT.

    Raises CommandFailed if another user owns the folder for its files.
    """
    return {
        ON_LOOPBACK: "0",
        "RAY_TMPDIR": _temporary(),
    }


def _temporary() -> str:
    """Return the parent of the folder in which a Ray for this machine only stores its sessions.

    Ray makes that folder writable for all users; the default parent keeps other users out.
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

    In a Ray job, Ray itself sets RAY_ADDRESS. Does nothing if already connected. Call it from the
    main thread: the processes of a local Ray end with the thread that started them.

    num_cpus: minimum number of CPUs that a local Ray offers; it offers at least all cores.
    metrics: whether a local Ray collects its own metrics, which uses a few percent of a core.
    logs: whether the output of Ray's other processes is printed here.

    Raises UserError if no cluster responds at RAY_ADDRESS, or if its token or its version of Ray
    or Python differs; CommandFailed if Ray does not start on this machine.
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
                f"RAY_ADDRESS is {address}, where no Ray responds{tls}; start Ray there, or unset "
                "RAY_ADDRESS to start Ray on this machine."
            )
        with _sigterm_kept():
            _join(address, **options)
        return
    global _local
    _local = True
    # Preemption notices come from cloud providers; this machine has none to watch for.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    options |= {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, num_cpus or 1),
        "include_dashboard": dashboard,
        "_temp_dir": str(Path(_temporary()) / "ray"),
        "_system_config": {**LEAN_RAYLET, "enable_metrics_collection": metrics},
    }
    # Ray read ON_LOOPBACK on import, so `loopback` changes it here; Ray's processes read it again.
    with _sigterm_kept(), ray_internals.loopback(), _set(ON_LOOPBACK, "0"):
        _start(lambda: ray.init(**options))


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore this process's SIGTERM handler, which Ray replaces with one that aborts."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def import_ray_data() -> ModuleType:
    """Import Ray Data, with its progress bars and the messages on its plans turned off."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data


def is_local() -> bool:
    """Return whether `connect` started the Ray that this process is connected to."""
    return _local


def join_running() -> bool:
    """Join the cluster at RAY_ADDRESS or on this machine; return False if there is none.

    A Ray on a loopback address belongs to the command that started it and is not joined.

    Raises UserError if no cluster responds at RAY_ADDRESS, and the other errors of `connect`.
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
    """Start Ray on this machine; try a second time if its processes did not start in time.

    Raises CommandFailed if the second attempt fails too.
    """
    import ray

    auth.ensure_token()
    ray_internals.reload_environment()
    for again in (False, True):
        try:
            with _told("Ray to start on this machine"), ray_internals.patient_start(START_S):
                init()
            return
        except Exception as error:  # Ray raises plain exceptions here
            ray.shutdown()
            reason = " ".join(str(error).split())[:200]
            if again:
                raise CommandFailed(f"Ray does not start on this machine: {reason}") from error
            print(f"Ray did not start ({reason}); trying once more.", file=sys.stderr)


def check_port_free(host: str, port: int) -> None:
    """Check that a port is free for a server. Raises UserError if a program listens on it."""
    if node_checks.port_is_taken(host, port):
        raise UserError(
            f"port {port} is taken by another program; stop that program "
            f"(ss -ltnp 'sport = :{port}' shows it), or give another port."
        )


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that the block starts."""
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
    """Print once on stderr what the block is waiting for, if it takes longer than PATIENCE_S."""
    words = f"waiting for {what}; other programs are using the CPU"
    timer = threading.Timer(PATIENCE_S, print, [words], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _join(address: str, **options: Any) -> None:
    """Join a cluster. Raises UserError if that fails, for example if its version of Ray differs."""
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
    """Disconnect from the cluster, and stop it if `connect` started it on this machine."""
    import ray

    global _local
    _local = False
    ray.shutdown()
