"""Clients with short texts, alone and beside one with long texts: the latency of the short ones.

    .venv/bin/python tests/bench/long_client.py [--share 0.2] [--load 0.6]

It serves the model of serve_texts.py, which must have been run before. Requests arrive at random
times. In both arms the engines have the same load, a fraction of what one text at a time would
take; in the second, the long texts are `share` of it.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

import httpx
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from tests import server
from tests.bench.peers import processes
from tests.bench.serve_peers import say
from tests.bench.serve_texts import NAME, VARIANT, model, seconds_alone

WARMUP_S = 5
SHORT, LONG, NUM_SHORT, REPLICAS = range(20, 61), 250, 10, 2


def main() -> None:
    options = parse()
    root = storage.resolve_path(options.storage)
    bundle = model(options.data, root)
    file = bundle.path / bundle.manifest.variants[VARIANT].file
    times_s = {
        length: seconds_alone(file, {"tokens": np.full((1, length), 7, np.int32)})
        for length in (SHORT[0], SHORT[-1], LONG)
    }
    short_s = (times_s[SHORT[0]] + times_s[SHORT[-1]]) / 2
    alone = options.load * REPLICAS / short_s
    rates = {
        "alone": (alone, 0.0),
        "beside": (
            (1 - options.share) * alone,
            options.share * options.load * REPLICAS / times_s[LONG],
        ),
    }
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in rates}
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        process = server.start(
            *(f"model=models:/{NAME}@production", f"storage={root}", f"variant={VARIANT}"),
            f"replicas={REPLICAS}",
            log=Path(folder) / "server.log",
            environment={processes.NAME: mark},
        )
        try:
            asyncio.run(load(*rates["beside"], WARMUP_S))
            for _ in range(options.rounds):
                for arm, (short, long) in rates.items():
                    figures = asyncio.run(load(short, long, options.duration))
                    found[arm].append(figures)
                    say(f"{arm}: {json.dumps(figures)}")
        finally:
            server.stop(process)
            processes.kill(mark)
    middle = {
        arm: {key: float(np.median([each[key] for each in rounds])) for key in rounds[0]}
        for arm, rounds in found.items()
    }
    ratio = middle["beside"]["short_p99_ms"] / middle["alone"]["short_p99_ms"]
    times_ms = {length: round(1e3 * value, 1) for length, value in times_s.items()}
    print(json.dumps({"times_ms": times_ms, "p99_ratio": round(ratio, 2), **middle}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of AG News")
    parser.add_argument("--storage", default=str(REPOSITORY / "build/texts"))
    parser.add_argument(
        "--load",
        type=float,
        default=0.3,
        help="utilization of the engines by the short texts alone",
    )
    parser.add_argument("--share", type=float, default=0.2, help="of the long texts in the load")
    parser.add_argument("--duration", type=float, default=30, help="seconds of an arm")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


async def load(short: float, long: float, duration: float) -> dict[str, float]:
    """Send short and long texts at these rates per second; return the latencies."""
    draws = np.random.default_rng(0)
    plan = [
        (at, f"short-{draws.integers(NUM_SHORT)}", int(draws.choice(SHORT)))
        for at in draws.uniform(0, duration, draws.poisson(short * duration))
    ]
    plan += [
        (at, "long", LONG) for at in draws.uniform(0, duration, draws.poisson(long * duration))
    ]
    plan.sort()
    latencies: dict[str, list[float]] = {"short": [], "long": []}
    failed = 0
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    async with httpx.AsyncClient(limits=limits, timeout=30) as client:
        started = time.perf_counter()

        async def send(at: float, name: str, length: int) -> None:
            nonlocal failed
            response = await client.post(
                f"http://127.0.0.1:8000/v2/models/{NAME}/infer",
                content=" ".join(["the"] * length).encode(),
                headers={
                    "Inference-Header-Content-Length": "0",
                    "Content-Type": "application/octet-stream",
                    "X-Client-Id": name,
                },
            )
            failed += response.status_code != 200
            latencies[name.partition("-")[0]].append(time.perf_counter() - started - at)

        sent = []
        for at, name, length in plan:
            await asyncio.sleep(max(at - (time.perf_counter() - started), 0))
            sent.append(asyncio.create_task(send(at, name, length)))
        await asyncio.gather(*sent)
    figures = {"requests": float(len(plan)), "failed": float(failed)}
    for name, values in latencies.items():
        for share in (50, 99) if values else ():
            figures[f"{name}_p{share}_ms"] = round(1e3 * float(np.percentile(values, share)), 1)
    return figures


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
