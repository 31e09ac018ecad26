"""Effect of an attacker at one address on clients at another: their latency and server memory.

    .venv/bin/python tests/bench/attacks.py --model BUNDLE [sockets json grpc]

The model's input is one image of 8×8 grey pixels, as for digits. Needs root to add addresses to the
loopback interface. Clients and server share this machine's cores. The last line on stdout is a JSON
object of all figures.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from tests import server

OWN, HONEST, ATTACKER = "10.98.0.1", "10.98.0.2", "10.98.0.3"
PORT, GRPC_PORT = 8000, 9000
RATE, DURATION_S, TIMEOUT_S, WARM_UP_S = 50, 15, 5, 3
SOCKETS, CALLS, MESSAGE_BYTES, JSON_BYTES = 4_300, 16, 60 << 20, (16 << 20) - 64
BODY = {"instances": [np.zeros((8, 8), int).tolist()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(ATTACKS))
    parser.add_argument("--model")
    parser.add_argument("--attack")
    parser.add_argument("--key", default="")
    given = parser.parse_args()
    if given.attack:
        asyncio.run(ATTACKS[given.attack](given.key))
        return
    measured: dict[str, Any] = {}
    with ExitStack() as stack:
        for address in (OWN, HONEST, ATTACKER):
            stack.enter_context(local_address(address))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        key = make_key(folder / "keys.yaml")
        for part in given.parts:
            options = f"model={given.model}", f"storage={folder}", "host=0.0.0.0"
            process = server.start(
                *options, f"security.api_keys_file={folder}/keys.yaml", log=folder / "serve.log"
            )
            try:
                with Memory() as calm:
                    before = honest_load(key)
                with Memory() as hot, attacking(part, key):
                    during = honest_load(key)
            finally:
                server.stop(process)
            measured[part] = {
                "before": {**before, **calm.most_mib},
                "during": {**during, **hot.most_mib},
            }
            print(part, json.dumps(measured[part]), flush=True)
    print(json.dumps(measured))


@contextmanager
def local_address(address: str) -> Iterator[None]:
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "address", "del", f"{address}/32", "dev", "lo"], check=True)


def make_key(path: Path) -> str:
    command = [sys.executable, "-m", "serve.security", "client", "--file", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def honest_load(key: str) -> dict[str, float]:
    """Request one row RATE times a second; return latencies in ms since each request was due."""
    latencies_s, failed = [], 0
    transport = httpx.HTTPTransport(local_address=HONEST)
    with httpx.Client(transport=transport, timeout=TIMEOUT_S) as client:
        began = time.monotonic() + WARM_UP_S
        for number in range(-WARM_UP_S * RATE, DURATION_S * RATE):
            due = began + number / RATE
            time.sleep(max(due - time.monotonic(), 0))
            try:
                answer = client.post(
                    f"http://{OWN}:{PORT}/v1/models/digits:predict",
                    json=BODY,
                    headers={"Authorization": f"Bearer {key}"},
                )
                wrong = answer.status_code != 200
            except httpx.TransportError:
                wrong = True
            if number >= 0:
                failed += wrong
                latencies_s.append(time.monotonic() - due)
            if time.monotonic() > began + 4 * DURATION_S:
                break
    if not latencies_s:  # the warm-up took all the time
        return {"asked": 0, "failed": 0}
    p50, p99 = np.percentile(np.array(latencies_s) * 1000, (50, 99))
    return {
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "asked": len(latencies_s),
        "failed": failed,
    }


class Memory:
    """Peak memory of the replica and of HAProxy while the context is open, in MiB."""

    def __enter__(self) -> "Memory":
        self.most_mib = {"replica_mib": 0, "haproxy_mib": 0}
        self._watch = subprocess.Popen(
            [sys.executable, "-c", WATCH], stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.terminate()
        assert self._watch.stdout is not None
        for line in self._watch.stdout:
            for name, value in json.loads(line).items():
                self.most_mib[name] = max(self.most_mib[name], value)


WATCH = """
import json, psutil, time
while True:
    most = {"replica_mib": 0, "haproxy_mib": 0}
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        info = process.info
        words = " ".join(info["cmdline"] or [])
        for name, is_one in (
            ("replica_mib", "ServeReplica" in words and "gateway" not in words),
            ("haproxy_mib", info["name"] == "haproxy"),
        ):
            if is_one and info["memory_info"]:
                most[name] = max(most[name], info["memory_info"].rss >> 20)
    print(json.dumps(most), flush=True)
    time.sleep(0.25)
"""


@contextmanager
def attacking(part: str, key: str) -> Iterator[None]:
    command = [sys.executable, __file__, "--attack", part, "--key", key]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as process:
        try:
            time.sleep(WARM_UP_S)
            yield
        finally:
            psutil.Process(process.pid).kill()


async def open_sockets(_: str) -> None:
    """Hold as many connections as possible, each with an incomplete request."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def hold() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(OWN, PORT, local_addr=(ATTACKER, 0))
                writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nx-")
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 28)
                writer.close()
            await asyncio.sleep(0.2)

    await asyncio.gather(*[hold() for _ in range(SOCKETS)])


async def send_json(key: str) -> None:
    """Send nested lists that no model accepts, in bodies of the maximum size."""
    part = b"[[[[]]]]"
    body = b'{"instances":[' + b",".join([part] * (JSON_BYTES // (len(part) + 1))) + b"]}"
    transport = httpx.AsyncHTTPTransport(local_address=ATTACKER)

    async def ask() -> None:
        while True:
            with suppress(httpx.TransportError):
                await client.post(
                    f"http://{OWN}:{PORT}/v1/models/digits:predict",
                    content=body,
                    headers={"Authorization": f"Bearer {key}"},
                )

    async with httpx.AsyncClient(transport=transport, timeout=60) as client:
        await asyncio.gather(*[ask() for _ in range(4)])


async def send_messages(_: str) -> None:
    """Send messages of the maximum size without a key over gRPC."""
    import grpc

    message = bytes(MESSAGE_BYTES)

    async def ask() -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"{OWN}:{GRPC_PORT}", options) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            while True:
                with suppress(grpc.RpcError):
                    await infer(message, timeout=60)

    await asyncio.gather(*[ask() for _ in range(CALLS)])


ATTACKS: dict[str, Callable[[str], Any]] = {
    "sockets": open_sockets,
    "json": send_json,
    "grpc": send_messages,
}

if __name__ == "__main__":
    main()
