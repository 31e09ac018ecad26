"""Texts of different lengths served by Halyard and by other servers: throughput and goodput.

    .venv/bin/python tests/bench/serve_texts.py --data FOLDER [--lengths FILE] [--servers …]

FOLDER has train.csv and test.csv of AG News. A transformer encoder of 6 layers and width 384 is
trained for one epoch on a few of its texts, once, and served as int8: what it predicts does not
matter here. Each server runs two workers with the same ONNX file and tokenizer, and receives one
text per request: first from connections that each wait for their response, then with Poisson
arrivals, to find the highest rate with a p99 of at most ten times the time of a text of median
length alone. The servers take turns for several rounds.

The `arrival-N` servers are Halyard with batches of up to N texts in order of arrival.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from tests.bench.peers import processes
from tests.bench.peers.candidates import (
    HERE,
    INFER,
    JSON_LENGTH,
    ONNX,
    PORT,
    Candidate,
    Peer,
    Setup,
    halyard,
)
from tests.bench.serve_peers import Client, Figures, measure, medians, running, say, table
from train.bundle import Bundle, registry
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine

NAME, VARIANT = "texts", "int8_static"
NUM_TEXTS, TRAIN_TEXTS = 256, 600
P99_TIMES = 10
TOKENIZERS = ("tokenizers>=0.21,<1", *ONNX)


def own(*more: str) -> Candidate:
    start = partial(_start_halyard, more=more)
    return Candidate("halyard", start, INFER, headers=(f"{JSON_LENGTH}: 0",))


def _start_halyard(setup: Setup, more: Sequence[str]) -> "subprocess.Popen[bytes]":
    return halyard(setup, *more)


def in_order(most: int) -> Candidate:
    return own("batching.by_length=false", f"batching.max_rows={most}")


CANDIDATES = {
    "halyard": own(),
    **{f"arrival-{most}": in_order(most) for most in (1, 2, 4, 16)},
    "fastapi": Candidate(
        "fastapi",
        Peer(
            "fastapi-texts",
            ("fastapi>=0.115,<1", "uvicorn[standard]>=0.34,<1", "orjson>=3.10,<4", *TOKENIZERS),
            (
                *("python", "-m", "uvicorn", f"{HERE}.fastapi_texts:app", "--port", str(PORT)),
                *("--workers", "2", "--no-access-log", "--log-level", "warning"),
            ),
        ),
    ),
    **{
        f"litserve-{most}": Candidate(
            "litserve",
            Peer(
                "litserve-texts",
                ("litserve>=0.2.19,<0.3", "uvicorn[standard]>=0.34,<1", *TOKENIZERS),
                ("python", "-m", f"{HERE}.litserve_texts"),
                {"BATCH": str(most)},
            ),
        )
        for most in (4, 16)
    },
    **{
        f"bentoml-{most}": Candidate(
            "bentoml",
            Peer(
                "bentoml-texts",
                ("bentoml>=1.4.39,<1.5", *TOKENIZERS),
                (
                    *("bentoml", "serve", f"{HERE}.bento_texts:Classifier"),
                    *("--host", "127.0.0.1", "--port", str(PORT)),
                ),
                {"BENTOML_DO_NOT_TRACK": "True", "BATCH": str(most)},
            ),
        )
        for most in (4, 16)
    },
}


def main() -> None:
    options = parse()
    root = storage.resolve_path(options.storage)
    bundle = model(options.data, root)
    encoder = bundle.task.features.encoders[0]
    texts = sample(options, encoder.tokenizer)
    file = bundle.path / bundle.manifest.variants[VARIANT].file
    lengths = [len(encoder.encode({"text": [text]})["tokens"][0]) for text in texts]
    middle = sorted(range(len(texts)), key=lambda number: lengths[number])[len(texts) // 2]
    alone_ms = seconds_alone(file, encoder.encode({"text": [texts[middle]]})) * 1e3
    spread = float(np.std(lengths) / np.mean(lengths))
    say(f"median {lengths[middle]} tokens, {alone_ms:.2f} ms; variation {spread:.2f}")
    rounds: dict[str, list[Figures]] = {name: [] for name in options.servers}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_text(encoder.tokenizer)
        bodies = [text.encode() for text in texts]
        clients = {
            name: Client.sending(
                CANDIDATES[name], NAME, bodies, CANDIDATES[name].headers, Path(folder) / name
            )
            for name in options.servers
        }
        for _ in range(options.rounds):
            for name in options.servers:
                if name in problems:
                    continue
                mark = uuid.uuid4().hex
                setup = Setup(
                    model=f"models:/{NAME}@production",
                    storage=root,
                    variant=VARIANT,
                    file=file,
                    venvs=options.peers_venv.resolve(),
                    log=Path(folder) / "server.log",
                    environment={
                        processes.NAME: mark,
                        "TOKENIZER": str(tokenizer),
                        "MAX_TOKENS": str(encoder.max_tokens),
                    },
                )
                try:
                    with running(CANDIDATES[name], setup, clients[name], mark):
                        found = measure(clients[name], mark, options, P99_TIMES * alone_ms)
                except RuntimeError as error:
                    problems[name] = str(error)
                    say(f"{name}: {error}")
                    continue
                rounds[name].append(found)
                say(f"{name}: {json.dumps(found)}")
    found_medians = {name: medians(found) for name, found in rounds.items() if found}
    say(table(found_medians))
    print(
        json.dumps(
            {
                "variant": VARIANT,
                "median_tokens": lengths[middle],
                "variation": round(spread, 3),
                "p99_ms": round(P99_TIMES * alone_ms, 1),
                "median": found_medians,
                "rounds": rounds,
                "problems": problems,
            }
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of AG News")
    parser.add_argument(
        "--lengths",
        type=Path,
        help="file with a number of words per line; default: those of AG News",
    )
    parser.add_argument("--storage", default=str(REPOSITORY / "build/texts"))
    parser.add_argument("--servers", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=float, default=3, help="seconds")
    parser.add_argument("--duration", type=float, default=10, help="seconds of the closed loop")
    parser.add_argument(
        "--step", type=float, default=8, help="seconds per rate that is tried; 0 skips this part"
    )
    parser.add_argument(
        "--peers-venv",
        type=Path,
        default=REPOSITORY / "build/peers",
        help="folder for the peers' environments",
    )
    return parser.parse_args()


def read(file: Path) -> list[dict[str, str]]:
    """Return the texts of a file of AG News, of title and body, with their labels."""
    with file.open(newline="") as opened:
        return [
            {"text": f"{row['title']} {row['text']}", "label": row["label"]}
            for row in csv.DictReader(opened)
        ]


def model(data: Path, root: str) -> Bundle:
    """Return the model to serve, trained now if the storage has none."""
    try:
        return Bundle.load(registry.resolve_model(f"models:/{NAME}@production", root)[0])
    except Exception as error:  # several types; training reports what is really wrong
        say(f"training the model, because there is none ({error})")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.csv"
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["text", "label"])
            writer.writeheader()
            writer.writerows(read(data / "train.csv")[:TRAIN_TEXTS])
        subprocess.run(
            [
                *(sys.executable, "train/main.py", "--name", NAME, "--data.train", str(file)),
                *(
                    "--target",
                    "label",
                    "--features",
                    '{"text": {"kind": "text"}}',
                    "--storage.path",
                    root,
                ),
                *("--net.text", "transformer", "--net.text_width", "384"),
                *("--net.text_layers", "6", "--optim.epochs", "1", "--stop.folds", "0"),
                *("--compress.variants", VARIANT, "--compress.max_accuracy_drop", "1"),
                *("--compress.measure_seconds", "1"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return Bundle.load(registry.resolve_model(f"models:/{NAME}@production", root)[0])


def sample(options: argparse.Namespace, tokenizer: str) -> list[str]:
    """Return the texts to send: of AG News, or of its words with the given lengths."""
    draws = np.random.default_rng(0)
    texts = [row["text"] for row in read(options.data / "test.csv")]
    if options.lengths is None:
        return [texts[number] for number in draws.permutation(len(texts))[:NUM_TEXTS]]
    lengths = [int(line) for line in options.lengths.read_text().split()]
    words = sorted(set(Tokenizer.from_str(tokenizer).get_vocab()) - {"[UNK]", "[SEP]"})
    words = [word for word in words if word.isalpha()]
    return [" ".join(draws.choice(words, length)) for length in draws.choice(lengths, NUM_TEXTS)]


def seconds_alone(file: Path, inputs: dict[str, np.ndarray]) -> float:
    """Return the median time of a text alone, on one thread."""
    engine = OnnxRuntimeEngine.load(file, num_threads=1)
    times = []
    for _ in range(40):
        started = time.perf_counter()
        engine.run(inputs)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
