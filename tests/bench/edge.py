"""Labels of the edge file compared with those of the server, on the whole test split.

    .venv/bin/python tests/bench/edge.py [--model models:/cifar10@production] [--storage runs]

The edge file runs in a process that can import neither torch nor ray. For models of images.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from cluster import storage
from tests import server
from tests.alone import edge_labels
from tests.serve.http.test_routes import v2_body
from train.bundle import Bundle, registry
from train.compress import export_edge
from train.config import validate_config
from train.data import dataset

ROWS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models:/cifar10@production")
    parser.add_argument("--storage", default=storage.DEFAULT_PATH)
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    root = storage.resolve_path(arguments.storage)
    bundle = Bundle.load(registry.resolve_model(arguments.model, root)[0])
    (name,) = (spec.name for spec in bundle.task.features.inputs)
    images, targets = dataset.prepare_dataset(validate_config(bundle.manifest.config), root).open(
        "test"
    )
    images_NHWC = np.array(images[name])
    url = f"{server.URL}/v2/models/{bundle.manifest.name}/infer"
    with tempfile.TemporaryDirectory() as folder:
        export_edge.export_edge(bundle, None, Path(folder))
        by_edge = edge_labels(Path(folder), name, images_NHWC)
        options = (f"model={bundle.path}", f"storage={root}")
        served = []
        with server.running(*options, log=Path(folder) / "serve.log"):
            for start in range(0, len(images_NHWC), ROWS):
                body = v2_body(images_NHWC[start : start + ROWS], name)
                answer = httpx.post(url, json=body, timeout=60).raise_for_status().json()
                served += answer["outputs"][0]["data"]
    true = [bundle.task.target.to_dict()["classes"][target] for target in targets]
    result = {
        "variant": bundle.manifest.default_variant,
        "images": len(served),
        "same_label": sum(a == b for a, b in zip(served, by_edge, strict=True)),
        "right": sum(a == b for a, b in zip(served, true, strict=True)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
