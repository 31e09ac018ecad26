"""Requests per second of a model behind HAProxy and of an empty handler on default Ray Serve.

    .venv/bin/python tests/bench/ingress.py [--model models:/cifar10@production]

Needs wrk (Debian: apt-get install wrk). The load runs on the same machine as the server.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from tests import server
from train.bundle import Bundle, registry

ROUNDS = 3
WARM_UP_S, DURATION_S = 4, 8
CONNECTIONS = 32
DEFAULT_SERVE = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models:/cifar10@production")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--storage", default=storage.DEFAULT_PATH)
    arguments = parser.parse_args()

    root = storage.resolve_path(arguments.storage)
    bundle = Bundle.load(registry.resolve_model(arguments.model, root)[0])
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / "request.lua", Path(folder) / "serve.log"
        script.write_text(infer_script(bundle))
        rates: dict[str, list[float]] = {"empty handler": [], "model": []}
        for _ in range(ROUNDS):
            with server.running(
                app="tests.bench.empty_serve:app", log=log, environment=DEFAULT_SERVE, ready="/"
            ) as url:
                rates["empty handler"].append(wrk(url))
            options = (f"model={arguments.model}", f"storage={root}")
            replicas = f"replicas={arguments.replicas}"
            with server.running(*options, replicas, log=log) as url:
                rates["model"].append(wrk(url, "--script", str(script)))
    middle = {name: round(median(values)) for name, values in rates.items()}
    result: dict[str, Any] = {
        "variant": bundle.manifest.default_variant,
        "replicas": arguments.replicas,
        "requests_per_s": {name: [round(value) for value in rates[name]] for name in rates},
        "median": middle,
        "ratio": round(middle["model"] / middle["empty handler"], 2),
    }
    print(json.dumps(result))


def infer_script(bundle: Bundle) -> str:
    """Return a wrk script that posts one random image as raw bytes, in v2's binary format."""
    (tensor,) = bundle.manifest.inputs
    shape = [1, *tensor.shape[1:]]
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).tobytes()
    entry = {"name": tensor.name, "shape": shape, "datatype": tensor.datatype}
    head = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": len(raw)}}]})
    escaped = "".join(f"\\{byte:03d}" for byte in head.encode() + raw)
    return f"""
wrk.method = "POST"
wrk.path = "/v2/models/{bundle.manifest.name}/infer"
wrk.body = "{escaped}"
wrk.headers["Inference-Header-Content-Length"] = "{len(head)}"
wrk.headers["Content-Type"] = "application/octet-stream"
"""


def wrk(url: str, *options: str) -> float:
    """Return requests per second after a warm-up. Raises RuntimeError on a non-2xx response."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", "--timeout", "10s", *options, url]
    for seconds in (WARM_UP_S, DURATION_S):
        done = subprocess.run(
            [*command, f"-d{seconds}s"], capture_output=True, text=True, check=True
        )
    output = done.stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(output)
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    assert found, output
    return float(found[1])


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
