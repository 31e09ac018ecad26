"""The same ONNX file served by Halyard and by other servers: throughput, latency, CPU cost.

    .venv/bin/python tests/bench/serve_peers.py [--model models:/cifar10@production] [--servers …]

Each server runs two workers and receives requests with one image each from the same client on the
same machine: first from connections that each wait for their response (closed loop), then with
random arrivals, to find the highest rate with a p99 of 50 ms. The servers take turns for several
rounds. Each peer is installed into its own environment; a peer that cannot be installed or started
is reported and left out.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from tests import server
from tests.bench.peers import processes
from tests.bench.peers.candidates import CANDIDATES, PORT, URL, Candidate, Setup, infer_json
from train.bundle import Bundle, registry
from train.bundle.manifest import TensorMetadata

NUM_IMAGES = 64
CONNECTIONS = 32
P99_MS = 50
READY_S = 90
BASE = "halyard"

Figures = dict[str, float]


def main() -> None:
    options = parse()
    root = storage.resolve_path(options.storage)
    bundle = Bundle.load(registry.resolve_model(options.model, root)[0])
    variant = options.variant or bundle.manifest.default_variant
    file = bundle.path / bundle.manifest.variants[variant].file
    (tensor,) = bundle.manifest.inputs
    rounds: dict[str, list[Figures]] = {name: [] for name in options.servers}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        clients = {
            name: Client.of(CANDIDATES[name], bundle.manifest.name, tensor, Path(folder) / name)
            for name in options.servers
        }
        for _ in range(options.rounds):
            for name in options.servers:
                if name in problems:
                    continue
                mark = uuid.uuid4().hex
                setup = Setup(
                    model=options.model,
                    storage=root,
                    variant=variant,
                    file=file,
                    venvs=options.peers_venv.resolve(),
                    log=Path(folder) / "server.log",
                    environment={processes.NAME: mark},
                )
                try:
                    with running(CANDIDATES[name], setup, clients[name], mark):
                        found = measure(clients[name], mark, options)
                except RuntimeError as error:
                    problems[name] = str(error)
                    say(f"{name}: {error}")
                    continue
                rounds[name].append(found)
                say(f"{name}: {json.dumps(found)}")
    middle = {name: medians(found) for name, found in rounds.items() if found}
    say(table(middle))
    result: dict[str, Any] = {
        "variant": variant,
        "connections": CONNECTIONS,
        "p99_ms": P99_MS,
        "versions": {name: CANDIDATES[name].version(options.peers_venv) for name in middle},
        "median": middle,
        "rounds": rounds,
        "problems": problems,
    }
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models:/cifar10@production")
    parser.add_argument("--storage", default=storage.DEFAULT_PATH)
    parser.add_argument("--variant", help="one with an ONNX file; default: the default variant")
    parser.add_argument("--servers", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=float, default=3, help="seconds")
    parser.add_argument("--duration", type=float, default=8, help="seconds of the closed loop")
    parser.add_argument(
        "--step", type=float, default=4, help="seconds per rate that is tried; 0 skips this part"
    )
    parser.add_argument(
        "--peers-venv",
        type=Path,
        default=REPOSITORY / "build/peers",
        help="folder for the peers' environments",
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Client:
    """The load test against one server.

    command: arguments of the load test without the load. url, body, headers: one of its requests.
    """

    command: Sequence[str]
    url: str
    body: bytes
    headers: dict[str, str]

    @classmethod
    def of(cls, candidate: Candidate, name: str, tensor: TensorMetadata, folder: Path) -> "Client":
        """Write request bodies with random images to a folder; return a client that sends them."""
        draws = np.random.default_rng(0)
        size = int(np.prod(tensor.shape[1:]))
        bodies = [candidate.body(tensor, draws.bytes(size)) for _ in range(NUM_IMAGES)]
        json_length = len(infer_json(tensor, bytes(size)))
        lines = [line.format(json_length=json_length) for line in candidate.headers]
        return cls.sending(candidate, name, bodies, lines, folder)

    @classmethod
    def sending(
        cls,
        candidate: Candidate,
        name: str,
        bodies: Sequence[bytes],
        lines: Sequence[str],
        folder: Path,
    ) -> "Client":
        """Write request bodies to a folder; return a client that sends them. lines: headers."""
        folder.mkdir()
        path = candidate.path.format(name=name)
        command = ["--path", path, "--content-type", candidate.content_type]
        for number, body in enumerate(bodies):
            file = folder / str(number)
            file.write_bytes(body)
            command += ["--body", str(file)]
        for line in lines:
            command += ["--header", line]
        headers = dict(line.split(": ") for line in lines)
        kind = {"Content-Type": candidate.content_type}
        return cls(command, f"{URL}{path}", bodies[0], headers | kind)

    def ask(self) -> httpx.Response:
        return httpx.post(self.url, content=self.body, headers=self.headers, timeout=READY_S)

    def load(self, *options: str) -> dict[str, Any]:
        """Return the load test's figures. Raises RuntimeError if it fails; stderr shows why."""
        command = [sys.executable, "-m", "serve.loadtest", URL, *self.command, *options]
        done = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError("the load test failed")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures


@contextmanager
def running(candidate: Candidate, setup: Setup, client: Client, mark: str) -> Iterator[None]:
    """Start a server, wait until it responds, and stop all of its processes at the end.

    Raises RuntimeError if the port is taken or the server does not start.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            raise RuntimeError(f"port {PORT} is taken; stop the program that uses it first")
    try:
        process = candidate.start(setup)
        try:
            wait_until_it_answers(process, client, setup.log)
            yield
        finally:
            server.stop(process)
    finally:
        processes.kill(mark)


def wait_until_it_answers(process: subprocess.Popen[bytes], client: Client, log: Path) -> None:
    """Wait for a response with 200. Raises RuntimeError if the server stops or time runs out."""
    deadline = time.monotonic() + READY_S
    problem = "no response"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            response = client.ask()
        except httpx.TransportError as error:
            problem = str(error)
        else:
            if response.status_code == 200:
                return
            problem = f"{response.status_code} {response.text[:300]}"
        time.sleep(0.1)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
    raise RuntimeError(f"the server is not ready ({problem}); its log ends:\n{end}")


def measure(
    client: Client, mark: str, options: argparse.Namespace, p99_ms: float = P99_MS
) -> Figures:
    """Measure the running server for one round. Raises RuntimeError if every request fails."""
    times = ("--warmup", str(options.warmup), "--duration", str(options.duration))
    before_s = processes.cpu_s(mark)
    closed = client.load("--connections", str(CONNECTIONS), *times)
    server_s = processes.cpu_s(mark) - before_s
    if closed["ok"] == 0:
        raise RuntimeError("no request succeeded under load")
    figures = {
        "requests_per_s": closed["ok_per_s"],
        "p50_ms": closed["latency_ms"]["p50"],
        "p99_ms": closed["latency_ms"]["p99"],
        "not_ok": closed["requests"] - closed["ok"],
        "client_us": closed["client_us_per_request"],
        "server_us": round(1e6 * server_s / closed["sent"], 1),
    }
    if options.step:
        first = ("--find-rate", "--p99", str(p99_ms), "--rate", str(closed["ok_per_s"] / 2))
        found = client.load(*first, "--warmup", "1", "--duration", str(options.step))
        figures["goodput_per_s"] = found["find_rate"]["goodput_per_s"]
    return figures


def medians(found: Sequence[Figures]) -> Figures:
    return {key: round(median(figures[key] for figures in found), 2) for key in found[0]}


def table(middle: dict[str, Figures]) -> str:
    """Return the medians as text, with the ratio of Halyard's rates to each server's."""
    columns = list(next(iter(middle.values()), {}))
    rates = [name for name in ("requests_per_s", "goodput_per_s") if name in columns]
    heads = [*columns, *(f"× {name.partition('_')[0]}" for name in rates)]
    lines = [f"{'':14}" + "".join(f"{head:>16}" for head in heads)]
    for name, figures in middle.items():
        shown = "".join(f"{figures[key]:16,.1f}" for key in columns)
        for key in rates:
            ours = middle.get(BASE, {}).get(key)
            ratio = f"{ours / figures[key]:.2f}" if ours and figures[key] else "-"
            shown += f"{ratio:>16}"
        lines.append(f"{name:14}{shown}")
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
