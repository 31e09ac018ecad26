"""python -m tests.bench.rollbacks BUNDLE: how soon a server serves the version in the registry.

The bundle is registered as three versions; the second is in production. Production is set back to
the first in each of several ways, while clients request predictions continuously. The last line on
stdout is a JSON object. For each way it contains the seconds from the event until "ready", when
the repository and every deployment are up again; the seconds until "served", after which every
response comes from the first version; and the number of failed responses.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.bench.serve_faults import URL, Bench
from tests.load import wait_for
from tests.registry_faults import publish

# Imported after serve_faults, which sets the environment that Ray Serve reads on import.
from ray import serve  # isort: skip

from cluster import connect
from serve.control.repository import TICK_S
from train.bundle import Bundle, registry

CLIENTS = 4
# Seconds for which every response must come from the first version before it counts as served.
STEADY_S = 15.0
NEW, OLD, CANDIDATE = "2", "1", "3"


class Rollbacks:
    """A server and its registry, in which the second version is in production at first."""

    def __init__(self, location: Path, root: Path) -> None:
        bundle = Bundle.load(str(location))
        self.name, self.root = bundle.manifest.name, str(root)
        self.bench = Bench(f"models:/{self.name}@production", self.root)
        publish(bundle, self.root, 0.5)
        self._client = registry.mlflow_client(self.root)
        first = self._client.get_model_version(self.name, OLD)
        for version in (NEW, CANDIDATE):
            copy = shutil.copytree(location, root / f"bundle-{version}")
            self._client.create_model_version(self.name, copy.as_uri(), run_id=first.run_id)

    def set_alias(self, version: str, alias: str = "production") -> None:
        self._client.set_registered_model_alias(self.name, alias, version)

    def deploy(self, **options: Any) -> None:
        self.bench.deploy(replicas="2", **options)

    def load(self) -> None:
        """Request the load until it succeeds: the repository may still be starting."""
        path = f"{URL}/v2/repository/models/{self.name}/load"
        wait_for(lambda: httpx.post(path, timeout=60).status_code == 200)

    def ready(self) -> bool:
        """Return whether the repository responds and all deployments are up."""
        app = serve.status().applications["default"]
        if any(each.status != "HEALTHY" for each in app.deployments.values()):
            return False
        try:
            return httpx.post(f"{URL}/v2/repository/index", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def kill_repository(self) -> None:
        words = "ray::ServeReplica:default:repository"
        shown = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True, check=True)
        for pid in shown.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def in_rollout(self) -> bool:
        stats = httpx.get(f"{URL}/v2/models/{self.name}/stats", timeout=10).json()
        return bool(stats.get("rollout"))

    @contextmanager
    def clients(self) -> Iterator[list[tuple[float, str]]]:
        """Request predictions; yield a list that collects each response's time and version."""
        address = f"{URL}/v2/models/{self.name}"
        wanted = httpx.get(address).json()["inputs"][0]
        shape = [max(size, 1) for size in wanted["shape"]]
        tensor = {"name": wanted["name"], "datatype": wanted["datatype"], "shape": shape}
        body = {"inputs": [{**tensor, "data": [0] * math.prod(shape)}]}
        seen: list[tuple[float, str]] = []
        done = threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=30) as client:
                while not done.wait(0.02):
                    try:
                        answer = client.post(f"{address}/infer", json=body)
                        found = answer.json().get("model_version") or str(answer.status_code)
                    except httpx.TransportError as error:
                        found = type(error).__name__
                    seen.append((time.monotonic(), found))

        threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def measure(self, event: Callable[[], None], **options: Any) -> dict[str, Any]:
        """Serve the second version, trigger the event, and return the figures."""
        self.set_alias(NEW)
        self.deploy(**options)
        with self.clients() as seen:
            wait_for(lambda: self.ready() and seen[-1:] != [] and seen[-1][1] == NEW)
            if options.get("canary"):
                self.set_alias(CANDIDATE, registry.CANDIDATE)
                wait_for(self.in_rollout)
            began = time.monotonic()
            event()
            wait_for(self.ready)
            ready_s = time.monotonic() - began
            # Wait for the first version alone, for longer than the server takes to follow an alias.
            wait_for(lambda: time.monotonic() - self._last_other(seen, began) > STEADY_S)
        after = [found for at, found in seen if at > began]
        return {
            "ready": round(ready_s, 1),
            "served": round(self._last_other(seen, began) - began, 1),
            "responses": len(after),
            "failed": sum(found not in (OLD, NEW, CANDIDATE) for found in after),
        }

    @staticmethod
    def _last_other(seen: list[tuple[float, str]], began: float) -> float:
        """Return the time of the last response that was not from the first version."""
        return max((at for at, found in seen[:] if found != OLD), default=began)


def measure_all(location: Path, root: Path) -> dict[str, Any]:
    rollbacks = Rollbacks(location, root)
    pinned = f"models:/{rollbacks.name}/{OLD}"

    def alias() -> None:
        rollbacks.set_alias(OLD)

    def alias_and_load() -> None:
        alias()
        rollbacks.load()

    def alias_and_redeploy() -> None:
        alias()
        rollbacks.deploy()

    def redeploy_pinned() -> None:
        rollbacks.deploy(model=pinned)

    def crash_and_alias() -> None:
        rollbacks.kill_repository()
        alias()

    def crash_and_load() -> None:
        rollbacks.kill_repository()
        alias_and_load()

    def crash_after_alias() -> None:
        """Crash when the server is about to follow the alias."""
        alias()
        time.sleep(TICK_S)
        rollbacks.kill_repository()

    rollout = {"shadow": 0.5, "canary": 0.5, "log.sample_rate": 1}
    ways: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
        "alias": (alias, {}),
        "load": (alias_and_load, {}),
        "redeploy": (alias_and_redeploy, {}),
        "redeploy of a number": (redeploy_pinned, {}),
        "alias during a rollout": (alias, rollout),
        "load during a rollout": (alias_and_load, rollout),
        "redeploy during a rollout": (alias_and_redeploy, rollout),
        "crash, then alias": (crash_and_alias, {}),
        "crash, then load": (crash_and_load, {}),
        "alias, then crash": (crash_after_alias, {}),
        "crash during a rollout, then alias": (crash_and_alias, rollout),
    }
    figures = {}
    for way, (event, options) in ways.items():
        figures[way] = rollbacks.measure(event, **options)
        print(f"{way}: {json.dumps(figures[way])}", file=sys.stderr, flush=True)
    return figures


def main(location: str) -> None:
    connect.connect(num_cpus=8)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_all(Path(location), Path(folder))
        serve.shutdown()
    connect.disconnect()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
