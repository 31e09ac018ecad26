"""Accuracy with few images: a pretrained encoder against training from scratch.

    .venv/bin/python tests/bench/few_images.py --photos FOLDER --pretrained FOLDER_OR_NAME
    .venv/bin/python tests/bench/few_images.py --classes FOLDER --pretrained FOLDER_OR_NAME

With --classes, FOLDER has train/CLASS and test/CLASS, of which images are drawn. With --photos,
each photograph or texture in FOLDER is a class: images to train on are crops of its left half, and
test images crops of its right half, of random size and brightness, half of them mirrored. Prints a
line per run.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from tests.bench.few_labels import test_accuracy
from train.config import validate_config
from train.training import train_run

# The augmentation that suits photographs, and small images, which a small net learns faster from.
SCRATCH = {
    "optim": {"epochs": 40, "batch_size": 60},
    "augment": {"flip": True, "translate": 4, "crop_area": 0.5},
    "features": {"image": {"kind": "image", "size": [64, 64]}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--photos", type=Path)
    source.add_argument("--classes", type=Path)
    parser.add_argument("--pretrained", required=True, help="as net.pretrained")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--test-per-class", type=int, default=50)
    parser.add_argument("--draws", type=int, default=3)
    names = ["scratch", "frozen", "full"]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    methods: dict[str, dict[str, Any]] = {
        "scratch": SCRATCH,
        "frozen": {"net": {"pretrained": options.pretrained, "freeze": "all"}},
        "full": {"net": {"pretrained": options.pretrained, "freeze": "none"}},
    }
    for draw in range(options.draws):
        with tempfile.TemporaryDirectory() as folder:
            write = write_crops if options.photos else copy_images
            write(options, Path(folder), np.random.default_rng(draw))
            for method in options.methods:
                started = time.perf_counter()
                accuracy = accuracy_of(methods[method], folder)
                seconds = round(time.perf_counter() - started, 1)
                row = {"draw": draw, "method": method, "accuracy": accuracy, "seconds": seconds}
                print(json.dumps(row), flush=True)


def copy_images(options: argparse.Namespace, folder: Path, draws: np.random.Generator) -> None:
    """Copy images of each class to folders below train/ and test/."""
    for split, count in (("train", options.per_class), ("test", options.test_per_class)):
        for source in sorted((options.classes / split).iterdir()):
            paths = sorted(source.iterdir())
            (folder / split / source.name).mkdir(parents=True)
            for at in draws.choice(len(paths), count, replace=False):
                shutil.copyfile(paths[at], folder / split / source.name / paths[at].name)


def write_crops(options: argparse.Namespace, folder: Path, draws: np.random.Generator) -> None:
    """Write crops of photographs to folders of classes below train/ and test/."""
    for path in sorted(options.photos.iterdir()):
        photo = Image.open(path).convert("RGB")
        middle = photo.width // 2
        halves = {
            "train": (photo.crop((0, 0, middle, photo.height)), options.per_class),
            "test": (photo.crop((middle, 0, photo.width, photo.height)), options.test_per_class),
        }
        for split, (half, count) in halves.items():
            target = folder / split / path.stem
            target.mkdir(parents=True)
            for number in range(count):
                crop(half, draws).save(target / f"{number}.png")


def crop(photo: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Return a square crop of 64 to 128 pixels, resized to 128."""
    side = int(min(draws.integers(64, 129), photo.width, photo.height))
    left, top = draws.integers(photo.width - side + 1), draws.integers(photo.height - side + 1)
    part = photo.crop((left, top, left + side, top + side)).resize((128, 128))
    if draws.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(part).enhance(draws.uniform(0.5, 1.5))


def accuracy_of(given: dict[str, Any], folder: str) -> float:
    config = validate_config(
        {
            "name": "photos",
            "data": {"train": f"{folder}/train", "test": f"{folder}/test"},
            "target": "label",
            "workers": {"num": 1, "cpus": os.cpu_count()},
            "storage": {"path": f"{folder}/runs"},
            **given,
        }
    )
    return test_accuracy(train_run(config))


if __name__ == "__main__":
    main()
