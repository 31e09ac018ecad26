"""Accuracy with few labels: a pretrained encoder against training from scratch, on AG News.

    .venv/bin/python tests/bench/few_labels.py --data FOLDER --pretrained FOLDER_OR_NAME

FOLDER has train.csv and test.csv of AG News. For each number of labels and each draw of them, the
same records are trained on with the encoder frozen, with adapters, with the whole encoder
trained, and without it, and by scikit-learn: logistic regression on the frozen vectors, and on
TF-IDF. Prints a line per run
and then a table of means over the draws.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

import torch

from train.config import validate_config
from train.loop.checkpoint import load_best_weights
from train.loop.evaluate import evaluate
from train.loop.net_setup import build_net, load_trained
from train.loop.parallelism import Worker
from train.nets.pretrained.backbones import read_weights
from train.nets.pretrained.hub import find_checkpoint
from train.nets.pretrained.text import PretrainedText
from train.tasks import Texts
from train.training import TrainedRun, train_run

NETS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "frozen": {"freeze": "all"},
    "lora": {"lora": {}},
    "full": {},
}
BATCH = 64


def main() -> None:
    options = parse()
    train, test = (read(options.data / f"{name}.csv") for name in ("train", "test"))
    test = test[: options.test_records]
    vectors = Vectors(options.pretrained)
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for labels in options.labels:
        for draw in range(options.draws):
            chosen = drawn(train, labels, draw)
            for method in options.methods:
                started = time.perf_counter()
                accuracy = accuracy_of(method, chosen, test, vectors, options)
                found[labels, method].append(accuracy)
                row = {"labels": labels, "draw": draw, "method": method, "accuracy": accuracy}
                row["seconds"] = round(time.perf_counter() - started, 1)
                print(json.dumps(row), flush=True)
    print("labels  " + "  ".join(f"{method:>8}" for method in options.methods))
    for labels in options.labels:
        means = [f"{np.mean(found[labels, method]):8.4f}" for method in options.methods]
        print(f"{labels:6}  " + "  ".join(means))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of AG News")
    parser.add_argument("--pretrained", required=True, help="as net.pretrained")
    parser.add_argument("--labels", type=int, nargs="+", default=[40, 100, 300, 2000])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--test-records", type=int, default=2000)
    methods = [*NETS, "vectors+lr", "tfidf+lr"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    return parser.parse_args()


def read(path: Path) -> list[tuple[str, str]]:
    """Return the texts of a file of AG News and their labels."""
    with path.open(newline="") as file:
        return [(f"{row['title']} {row['text']}", row["label"]) for row in csv.DictReader(file)]


def drawn(rows: list[tuple[str, str]], count: int, draw: int) -> list[tuple[str, str]]:
    """Return `count` records, equally many of each label."""
    order = np.random.default_rng(draw).permutation(len(rows))
    names = sorted({label for _, label in rows})
    return [
        row
        for name in names
        for row in [rows[at] for at in order if rows[at][1] == name][: count // len(names)]
    ]


def accuracy_of(
    method: str,
    train: list[tuple[str, str]],
    test: list[tuple[str, str]],
    vectors: "Vectors",
    options: argparse.Namespace,
) -> float:
    (texts, labels), (test_texts, truths) = (zip(*rows, strict=True) for rows in (train, test))
    if method in NETS:
        return of_fit(method, train, test, options.pretrained)
    if method == "vectors+lr":
        inputs, test_inputs = vectors(list(texts)), vectors(list(test_texts))
    else:
        tfidf = TfidfVectorizer(sublinear_tf=True)
        inputs, test_inputs = tfidf.fit_transform(texts), tfidf.transform(test_texts)
    model = LogisticRegression(max_iter=2000).fit(inputs, labels)
    return float(model.score(test_inputs, truths))


def of_fit(
    method: str, train: list[tuple[str, str]], test: list[tuple[str, str]], pretrained: str
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", train), ("test", test)):
            with Path(folder, f"{name}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
        net = NETS[method]
        if method != "scratch":
            net = {"pretrained": pretrained, "freeze": "none", **net}
        trained = train_run(
            validate_config(
                {
                    "name": "news",
                    "data": {"train": f"{folder}/train.csv", "test": f"{folder}/test.csv"},
                    "target": "label",
                    "features": {"text": "text"},
                    "net": net,
                    "workers": {"num": 1, "cpus": os.cpu_count()},
                    "storage": {"path": f"{folder}/runs"},
                }
            )
        )
        return test_accuracy(trained)


def test_accuracy(trained: TrainedRun) -> float:
    config, data = trained.config, trained.data
    weights, _ = load_best_weights(trained.run.store(config.checkpoint.keep))
    net = build_net(config, data.task)
    load_trained(net, weights, data)
    inputs, targets = data.open("test")
    outputs = evaluate(net.eval(), inputs, Worker(0, 1, torch.device("cpu")))
    assert outputs is not None
    return data.task.metrics(outputs, targets, "test")["test_accuracy"]


class Vectors:
    """The frozen vectors of texts, each computed once."""

    def __init__(self, name: str) -> None:
        checkpoint = find_checkpoint(name)
        most = min(checkpoint.max_tokens or 256, 256)
        tokenizer = checkpoint.tokenizer.read_text()
        self._texts = Texts(("text",), most, tokenizer=tokenizer).fit({"text": ["a"]})
        self._encoder = PretrainedText(checkpoint.architecture, checkpoint.pooling, "all").eval()
        self._encoder.load_backbone(read_weights(checkpoint))
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        new = sorted(set(texts) - self._known.keys(), key=len)
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            tokens = torch.from_numpy(self._texts.encode({"text": part})["tokens"])
            with torch.inference_mode():
                self._known |= dict(zip(part, self._encoder.embed(tokens).numpy(), strict=True))
        return np.stack([self._known[text] for text in texts])


if __name__ == "__main__":
    main()
