"""Cost of the monitor and the request log: throughput with and without them, measured in turns.

    python tests/bench/monitor_cost.py --model models:/cifar10@production [--storage runs] \
        [--rounds 4] [--seconds 8] [--on drift.rows_per_s=200 log.sample_rate=0.1]

The load generator runs on the same machine. The last line on stdout is a JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from serve.loadtest import ClosedLoad, LoadTarget, run_load
from serve.loadtest.target import infer_requests
from tests import server
from train.bundle import Bundle, registry

OFF = ("drift.rows_per_s=0",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models:/cifar10@production")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--on", nargs="+", default=["log.sample_rate=0.1"])
    given = parser.parse_args()
    root = storage.resolve_path(given.storage)
    name = Bundle.load(registry.resolve_model(given.model, root)[0]).manifest.name

    def throughput(*options: str) -> float:
        chosen = (f"model={given.model}", f"storage={root}", "access_log=none", *options)
        with (
            tempfile.TemporaryDirectory() as folder,
            server.running(*chosen, log=Path(folder, "log")) as url,
        ):
            requests = infer_requests(url, name, {}, num_requests=256, rows=1, seed=0, timeout_s=10)
            target = LoadTarget(url, requests)
            report = run_load(
                target, ClosedLoad(given.clients), warmup_s=3, duration_s=given.seconds
            )
            assert report.ok == report.requests, "requests failed"
            return report.ok_per_s

    ratios = []
    for number in range(given.rounds):
        arms = [("off", OFF), ("on", tuple(given.on))]
        # Change the order each round, because the first one runs on a cooler machine.
        found = {name: throughput(*options) for name, options in arms[:: 1 - 2 * (number % 2)]}
        ratios.append(found["on"] / found["off"])
        print(f"off {found['off']:8.0f}/s   on {found['on']:8.0f}/s   ratio {ratios[-1]:.3f}")
    print(json.dumps({"on": given.on, "ratios": ratios, "median": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
