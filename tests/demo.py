"""make demo: train on digits, compress, register, serve, and predict the test split over HTTP.

Each step runs the command that a user would type.
"""

import argparse
import base64
import http.client
import io
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from tests import server
from train import cli
from train.data import dataset

CONNECTIONS = 8
# Each image is sent this many times, so that the measurement takes more than a second.
ROUNDS = 8


@dataclass(frozen=True)
class Figures:
    accuracy: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    keep = parser.parse_args().keep
    console = Console()

    console.rule("python train/main.py")
    result = train()
    model = f"models:/{result['model']}/{result['version']}"
    images, labels = test_split()
    bodies = [request_body(image) for image in images]

    default = result["default_variant"]
    figures = {}
    for variant in dict.fromkeys(["fp32", default]):
        console.rule(f"serve run serve.app model={model} variant={variant}")
        log = Path(tempfile.gettempdir()) / f"halyard-demo-{variant}.log"
        process = server.start(f"model={model}", f"variant={variant}", log=log)
        try:
            figures[variant] = ask(result["model"], bodies, labels)
        finally:
            if not (keep and variant == default and variant in figures):
                server.stop(process)
    show(console, result, figures, len(labels))
    if keep:
        console.print(f"\nThe server is running at {server.URL}; stop it with: kill {process.pid}")


def train() -> dict[str, Any]:
    """Run the training command with its progress on the terminal; return its JSON result."""
    command = [sys.executable, "train/main.py"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_split() -> tuple[np.ndarray, list[str]]:
    """Return the images (uint8 [N, H, W, C]) and the labels of the test split."""
    config = cli.parse([]).config
    data = dataset.prepare_dataset(config, storage.resolve_path(config.storage.path))
    inputs, targets = data.open("test")
    classes = data.summary["task"]["target"]["classes"]
    return next(iter(inputs.values())), [classes[target] for target in targets]


def request_body(image_HWC: np.ndarray) -> bytes:
    """Return a KServe V1 request with the image as PNG."""
    file = io.BytesIO()
    Image.fromarray(image_HWC.squeeze()).save(file, "PNG")
    return json.dumps({"instances": [{"b64": base64.b64encode(file.getvalue()).decode()}]}).encode()


def ask(model: str, bodies: list[bytes], labels: list[str]) -> Figures:
    """Send every image several times over a few connections, one request at a time on each."""
    path = f"/v1/models/{model}:predict"

    def work(numbers: range) -> list[tuple[bool, float]]:
        connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
        answers = []
        for number in numbers:
            started = time.perf_counter()
            connection.request("POST", path, bodies[number % len(bodies)])
            response = connection.getresponse()
            content = response.read()
            seconds = time.perf_counter() - started
            if response.status != 200:
                raise RuntimeError(f"{response.status} for image {number}: {content!r}")
            label = json.loads(content)["predictions"][0]["label"]
            answers.append((label == labels[number % len(labels)], seconds))
        connection.close()
        return answers

    total = ROUNDS * len(bodies)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(work, [range(CONNECTIONS * 4)] * CONNECTIONS))  # warm-up
        started = time.perf_counter()
        parts = pool.map(work, [range(part, total, CONNECTIONS) for part in range(CONNECTIONS)])
        answers = [answer for part in parts for answer in part]
        seconds = time.perf_counter() - started
    latencies_ms = np.array([latency for _, latency in answers]) * 1e3
    return Figures(
        accuracy=float(np.mean([right for right, _ in answers])),
        requests_per_s=len(answers) / seconds,
        p50_ms=float(np.percentile(latencies_ms, 50)),
        p99_ms=float(np.percentile(latencies_ms, 99)),
    )


def show(
    console: Console, result: dict[str, Any], figures: dict[str, Figures], num_images: int
) -> None:
    table = Table(title=f"{num_images} test images as PNG over HTTP, {CONNECTIONS} connections")
    table.add_column("variant")
    for heading in ("accuracy", "bytes", "requests/s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right")
    for variant, row in figures.items():
        mark = " (default)" if variant == result["default_variant"] else ""
        table.add_row(
            variant + mark,
            f"{row.accuracy:.4f}",
            f"{result['variants'][variant]['bytes']:,}",
            f"{row.requests_per_s:,.0f}",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
        )
    console.print()
    console.print(table)
    database = storage.tracking_uri(storage.resolve_path(cli.parse([]).config.storage.path))
    console.print("Where to look next", style="bold")
    for line in (
        f"pictures   {result['bundle']}/report/",
        f"registry   .venv/bin/mlflow ui --backend-store-uri {database}",
        f"server     .venv/bin/serve run serve.app model={result['uri']}",
        f"try it     {server.URL} while the server runs",
    ):
        console.print(f"  {line}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
