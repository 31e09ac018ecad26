"""Outcome of requests while a server is overloaded, changes, or loses replicas.

    .venv/bin/python tests/bench/serve_faults.py --model models:/cifar10@production \
        [overload kill changes step slow]

Each part prints its figures; the last line on stdout is a JSON object of all figures. The load
generator runs on the same machine as the server.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

import serve as halyard
from cluster import storage

halyard.set_serve_environment()

from ray import serve

from cluster import connect
from serve import deployment
from serve.loadtest import ClosedLoad, LoadTarget, LoadTestReport, PoissonLoad, run_load
from serve.loadtest.target import infer_requests
from tests.load import brief, failures, meanwhile, wait_for
from train.bundle import registry

URL = "http://127.0.0.1:8000"
READY_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="overload kill changes step slow; default: all")
    parser.add_argument("--model", default="models:/cifar10@production")
    parser.add_argument("--storage", default=storage.DEFAULT_PATH)
    parser.add_argument("--overload-s", type=float, default=60)
    given = parser.parse_args()
    connect.connect(num_cpus=8)
    bench = Bench(given.model, given.storage)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "overload": lambda: overload(bench, given.overload_s),
        "kill": lambda: kill(bench),
        "changes": lambda: changes(bench),
        "step": lambda: step(bench),
        "slow": lambda: slow(bench),
    }
    figures = {}
    for part in given.parts or parts:
        figures[part] = parts[part]()
        print(f"{part}: {json.dumps(figures[part], indent=1)}", file=sys.stderr)
    serve.shutdown()
    connect.disconnect()
    print(json.dumps(figures))


class Bench:
    """A server with one model, deployed by this process."""

    def __init__(self, model: str, root: str) -> None:
        self.model, self.storage = model, root
        self.name = ""

    def deploy(self, **options: Any) -> None:
        arguments = {"model": self.model, "storage": self.storage, **options}
        built = deployment.app(arguments)
        serve.run(built)
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{URL}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        self.name = httpx.get(f"{URL}/v2/models").json()["models"][0]

    def target(self, rows: int = 1, **headers: str) -> LoadTarget:
        requests = infer_requests(
            URL, self.name, headers, num_requests=64, rows=rows, seed=0, timeout_s=10
        )
        return LoadTarget(URL, requests)

    def replicas(self) -> int:
        """Return the number of running replicas."""
        deployments = serve.status().applications["default"].deployments
        return deployments[self.name].replica_states.get("RUNNING", 0)

    def pids(self) -> list[int]:
        words = f"ray::ServeReplica:default:{self.name}"
        found = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]


@contextmanager
def memory(pids: Sequence[int]) -> Iterator[list[float]]:
    """Sample the total resident memory of processes in MiB, four times a second."""
    samples: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
            samples.append(sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    yield samples
    done.set()
    thread.join()


def overload(bench: Bench, seconds: float) -> dict[str, Any]:
    """Offer five times the capacity; measure goodput, latency, memory and recovery."""
    bench.deploy(replicas="2", variant="fp32", **{"limits.timeout_s": 1})
    target = bench.target(rows=16)
    capacity = run_load(target, ClosedLoad(16), warmup_s=3, duration_s=8).ok_per_s
    with memory(bench.pids()) as used:
        hard = run_load(
            target, PoissonLoad(5 * capacity), warmup_s=2, duration_s=seconds, timeout_s=10
        )
    after = run_load(
        target, PoissonLoad(capacity / 2), warmup_s=0, duration_s=6, timeout_s=10, seed=1
    )
    calm = run_load(
        target, PoissonLoad(capacity / 2), warmup_s=2, duration_s=6, timeout_s=10, seed=2
    )
    latency = hard.latency_ms or {}
    return {
        "capacity_per_s": capacity,
        "offered_per_s": hard.offered_per_s,
        "goodput_of_capacity": round(hard.ok_per_s / capacity, 3),
        "p50_ms": latency.get("p50"),
        "p99_ms": latency.get("p99"),
        "max_ms": latency.get("max"),
        "deadline_ms": 1000,
        "shed": hard.shed,
        "shed_with_retry_after": hard.shed_with_retry_after,
        "shed_p99_ms": hard.shed_p99_ms,
        "others": failures(hard) - hard.shed,
        "server_errors": hard.server_errors,
        "memory_mib": [round(used[0], 1), round(max(used), 1), round(used[-1], 1)],
        "half_load_at_once_after": brief(after),
        "half_load_later": brief(calm),
    }


def kill(bench: Bench) -> dict[str, Any]:
    """Kill one of two replicas under load; compare clients with and without retries."""
    figures = {}
    for name, retries in (("retrying", 5), ("raw", 0)):
        bench.deploy(replicas="2")
        wait_for(lambda: bench.replicas() == 2)
        target = bench.target()
        with meanwhile(
            target, ClosedLoad(32), warmup_s=2, duration_s=12, timeout_s=20, retries=retries
        ) as reports:
            time.sleep(5)
            os.kill(bench.pids()[0], signal.SIGKILL)
            began = time.monotonic()
            wait_for(lambda: bench.replicas() < 2)
            wait_for(lambda: bench.replicas() == 2)
            back_s = time.monotonic() - began
        figures[name] = {**brief(reports[0]), "second_replica_after_s": round(back_s, 1)}
    return figures


def changes(bench: Bench) -> dict[str, Any]:
    """Change the version by alias, the variant and the number of replicas, all under load."""
    figures: dict[str, Any] = {}

    def under_load(name: str, change: Callable[[], None], seconds: float) -> None:
        with meanwhile(
            bench.target(), PoissonLoad(300), warmup_s=1, duration_s=seconds, timeout_s=20
        ) as reports:
            time.sleep(3)
            began = time.monotonic()
            change()
            taken_s = round(time.monotonic() - began, 1)
        figures[name] = {"change_s": taken_s, **brief(reports[0])}

    bench.deploy(replicas="2")
    name, root = bench.name, storage.resolve_path(bench.storage)
    client = registry.mlflow_client(root)
    before = client.get_model_version_by_alias(name, "production").version
    other = next(
        v.version for v in client.search_model_versions(f"name='{name}'") if v.version != before
    )

    def alias() -> None:
        client.set_registered_model_alias(name, "production", other)
        loaded = httpx.post(f"{URL}/v2/repository/models/{name}/load", timeout=60)
        assert loaded.json()["default"] == str(other), loaded.text

    try:
        under_load("alias", alias, 12)
    finally:
        client.set_registered_model_alias(name, "production", before)
    under_load("redeploy", lambda: bench.deploy(replicas="2", variant="int8_static"), 60)
    under_load("more replicas", lambda: bench.deploy(replicas="3", variant="int8_static"), 25)
    under_load("fewer replicas", lambda: bench.deploy(replicas="1", variant="int8_static"), 50)
    return figures


def step(bench: Bench) -> dict[str, Any]:
    """Raise the load from 1 to 60 connections on a server that may scale to three replicas."""
    bench.deploy(replicas="1-3", **{"autoscaling.downscale_delay_s": 5})
    wait_for(lambda: bench.replicas() == 1)
    target = bench.target()
    with meanwhile(target, ClosedLoad(1), warmup_s=1, duration_s=4) as reports:
        pass
    figures: dict[str, Any] = {"one": brief(reports[0])}
    with meanwhile(target, ClosedLoad(60), warmup_s=0, duration_s=30, timeout_s=20) as reports:
        began = time.monotonic()
        wait_for(lambda: bench.replicas() >= 2, 30)
        figures["two_replicas_after_s"] = round(time.monotonic() - began, 1)
    figures["sixty"] = brief(reports[0])
    began = time.monotonic()
    with meanwhile(target, ClosedLoad(1), warmup_s=0, duration_s=60, timeout_s=20) as reports:
        wait_for(lambda: bench.replicas() == 1, 60)
        figures["back_to_one_after_s"] = round(time.monotonic() - began, 1)
    figures["one_again"] = brief(reports[0])
    return figures


def slow(bench: Bench) -> dict[str, Any]:
    """Let 500 clients send one byte a second each while one normal client is measured."""
    bench.deploy(replicas="2")
    target = bench.target()
    request = target.requests[0]

    def measured(seed: int) -> LoadTestReport:
        return run_load(target, PoissonLoad(300), warmup_s=1, duration_s=8, seed=seed)

    before = measured(0)
    crowd = []
    for number in range(500):
        connection = socket.create_connection(("127.0.0.1", 8000))
        # Half of them stop within the header section, half within the body.
        connection.sendall(request[: 60 if number % 2 else len(request) - 1000])
        crowd.append(connection)
    done = threading.Event()

    def dribble() -> None:
        position = len(request) - 1000
        while not done.wait(1):
            for number, connection in enumerate(crowd):
                with suppress(OSError):
                    connection.sendall(b"x" if number % 2 else request[position : position + 1])
            position += 1

    thread = threading.Thread(target=dribble)
    thread.start()
    during = measured(1)
    done.set()
    thread.join()
    for connection in crowd:
        connection.close()
    after = measured(2)
    return {
        name: brief(report)
        for name, report in (("before", before), ("during", during), ("after", after))
    }


if __name__ == "__main__":
    main()
