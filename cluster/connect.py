"""Join a running Ray cluster, or start a lean one on this machine."""

import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster import auth, private
from cluster.errors import Failed, UserError

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
# What a cluster that is up takes far less than, also on a busy machine.
ANSWER_S = 4.0

# In the kernel's tables of connections.
LISTENING = "0A"

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_local = False


def prepare_environment() -> None:
    """Set Ray's environment variables that are not set already."""
    private.prepare_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def local_environment() -> dict[str, str]:
    """What a Ray that starts on this machine alone needs besides ENVIRONMENT.

    Raises Failed.
    """
    return {
        ON_LOOPBACK: "0",
        "RAY_TMPDIR": _temporary(),
    }


def _temporary() -> str:
    """Where a Ray of this machine alone keeps the folder of its sessions.

    Ray lets every user of the machine write in it; the default keeps them out.
    """
    return os.environ.get("RAY_TMPDIR") or str(private.folder("ray").parent)


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
    prepare_environment()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": logs, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        if not _answers(address):
            raise UserError(
                f"RAY_ADDRESS is {address}, where no Ray answers; start it there, or unset "
                "RAY_ADDRESS to start Ray on this machine."
            )
        with _sigterm_kept():
            _join(address, **options)
        return
    from ray._private import ray_constants

    global _local
    _local = True
    # This machine is not taken away with notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray has read ON_LOOPBACK on import, before it is set.
    ray_constants.ENABLE_RAY_CLUSTER = False
    options |= {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, num_cpus or 1),
        "include_dashboard": dashboard,
        "_temp_dir": str(Path(_temporary()) / "ray"),
        "_system_config": {**LEAN_RAYLET, "enable_metrics_collection": metrics},
    }
    with _sigterm_kept(), _set(ON_LOOPBACK, "0"):
        _start(lambda: ray.init(**options))


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Put this process's handler of SIGTERM back, in whose place Ray puts ones that abort."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


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

    Raises UserError where no cluster answers at RAY_ADDRESS, and as `connect` does.
    """
    prepare_environment()
    if address := os.environ.get("RAY_ADDRESS"):
        connect()
        return address != "local"
    address = forget_ended()
    if not address or address.rpartition(":")[0] in LOOPBACK:
        return False
    _join(address, logging_level=logging.WARNING)
    return True


def forget_ended() -> str | None:
    """Return the address of the Ray that runs on this machine by Ray's own notes, if any.

    Where it has ended, which Ray finds out in minutes only, the note is removed, and stderr says
    so. Raises UserError where it asks for another token.
    """
    address = _noted_address()
    if address is None or _answers(address):
        return address
    print(f"Ray has ended at {address}, which {_notes()} still named.", file=sys.stderr)
    with suppress(OSError):
        _notes().unlink()
    return None


def _notes() -> Path:
    from ray._common.utils import get_ray_address_file

    return Path(get_ray_address_file(None))


def _noted_address() -> str | None:
    """The address of the Ray that was started last on this machine, by this user or by root.

    Every user may write there, and whom this process joins may run code in it.
    """
    try:
        # A pipe would be waited for.
        file = os.open(_notes(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file) as notes:
            found = os.fstat(file)
            is_ours = stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.getuid())
            return (notes.read().strip() or None) if is_ours else None
    except OSError:
        return None


def _answers(address: str) -> bool:
    """Whether Ray answers at HOST:PORT; other forms of address are taken to answer.

    Ray itself tries for minutes. Raises UserError where it asks for another token.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        return True
    if _is_of_another_user(host, int(port)):
        return False
    auth.ensure_token()
    _refresh()
    with init_grpc_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(_other_token(address)) from None
            return False  # nothing is there, or another program
    return True


def _is_of_another_user(host: str, port: int) -> bool:
    """Whether an address of this machine is listened on by another user than this one and root.

    Where a Ray has died anybody may take its port, and would be sent the token.
    """
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError:
        return False  # of another machine, or no address
    users = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                    users.add(int(uid))
    return not users <= {0, os.getuid()}


def _other_token(address: str) -> str:
    return (
        f"the cluster at {address} asks for another token. Set {auth.MODE}=token, and {auth.PATH} "
        "to a file with the cluster's token where that is not in ~/.ray/auth_token."
    )


def _refresh() -> None:
    """Let Ray see the environment as it is: it has read it on import, perhaps before it was set."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


def _start(init: Callable[[], Any]) -> None:
    """Start Ray on this machine; once more, where its processes were not up in time.

    Raises Failed when that fails too.
    """
    import ray

    auth.ensure_token()
    _refresh()
    for again in (False, True):
        try:
            with _told("Ray to start on this machine"), _patient():
                init()
            return
        except Exception as error:  # Ray raises plain ones here
            ray.shutdown()
            reason = " ".join(str(error).split())[:200]
            if again:
                raise Failed(f"Ray does not start on this machine: {reason}") from error
            print(f"Ray did not start ({reason}); trying once more.", file=sys.stderr)


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


@contextmanager
def _patient() -> Iterator[None]:
    """Let Ray's node take START_S to start, for which Ray has a constant of 30 s.

    Ray counts them between the calls of `get_node`, which fails until the node is there.
    """
    import psutil
    from ray._private import services

    get_node = services.get_node

    def starts() -> bool:
        return any("raylet" in child.name() for child in psutil.Process().children())

    def wait_for_node(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + START_S
        while True:
            try:
                return get_node(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline or not starts():
                    raise
            time.sleep(0.2)

    services.get_node = wait_for_node
    try:
        yield
    finally:
        services.get_node = get_node


def _join(address: str, **options: Any) -> None:
    """Raises UserError where the cluster cannot be joined, such as one of another Ray."""
    import ray

    auth.ensure_token()
    _refresh()
    try:
        ray.init(address=address, **options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(_other_token(address)) from error
    except ConnectionError as error:
        raise UserError(f"the cluster at {address} cannot be joined: {error}") from error
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if "Version mismatch" in words:
            raise UserError(f"{words} Use the same versions here as on the cluster.") from error
        raise


def logs() -> str:
    """Where Ray's processes of this machine write what they log."""
    from ray._private import worker

    return str(worker._global_node.get_logs_dir_path())


def silence() -> None:
    """Show nothing more of what other processes print."""
    from ray._private import ray_logging, worker

    ray_logging.global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    worker.print_to_stdstream = lambda data, **options: None


def disconnect() -> None:
    """Leave the cluster; a local Ray that `connect` started stops with it."""
    import ray

    global _local
    _local = False
    ray.shutdown()
