"""Malformed TLS, HTTP/1.1, HTTP/2 and gRPC sent to a server: its responses and its memory.

    .venv/bin/python tests/bench/fuzz.py --model BUNDLE --inputs 100000

The last line on stdout is a JSON object. Its `faults` are the inputs whose response was 5xx,
UNKNOWN or INTERNAL; `--show NUMBER` prints one of the inputs.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from tests import server, wire_fuzz
from tests.authority import Authority

STEP = 5_000
WATCHED = ("haproxy", "ServeReplica", "ServeController", "ProxyActor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int)
    given = parser.parse_args()
    if given.show is not None:
        print(*wire_fuzz.make_input(given.seed, given.show))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority(folder)
        cert, key = authority.issue("server")
        options = [f"model={given.model}", f"storage={folder}", "log.sample_rate=1"]
        options += [f"security.tls_cert={cert}", f"security.tls_key={key}"]
        with server.running(*options, log=folder / "serve.log", tls=authority.context()) as url:
            print(json.dumps(measure(given, url, authority)))


def measure(given: argparse.Namespace, url: str, authority: Authority) -> dict[str, object]:
    counts: Counter[str] = Counter()
    faults, memory = [], []
    began = time.perf_counter()
    for start in range(0, given.inputs, STEP):
        numbers = range(start, min(start + STEP, given.inputs))
        outcome = asyncio.run(
            wire_fuzz.attack(numbers, given.seed, (8000, 9000), authority.context)
        )
        counts += outcome.counts
        faults += outcome.faults
        memory.append(mib())
        seconds = time.perf_counter() - began
        print(f"{numbers.stop} inputs, {seconds:.0f} s, {memory[-1]} MiB", file=sys.stderr)
    ready = httpx.get(f"{url}/v2/health/ready", verify=authority.context(), trust_env=False)
    return {
        "inputs": given.inputs,
        "seconds": round(time.perf_counter() - began, 1),
        "answers": dict(sorted(counts.items())),
        "faults": faults,
        "ready": ready.status_code,
        "mib": memory,
    }


def mib() -> dict[str, float]:
    """Return the memory of the server's processes in MiB, summed by kind."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        words = " ".join(process.info["cmdline"] or [])
        for kind in WATCHED:
            if kind in words and process.info["memory_info"]:
                found[kind] += process.info["memory_info"].rss / 2**20
    return {kind: round(size) for kind, size in found.items()}


if __name__ == "__main__":
    main()
