"""Run code in a process that can import neither torch nor ray nor a package of this project."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

WITHOUT = """
import sys
for name in ("torch", "ray", "train", "serve", "cluster"):
    sys.modules[name] = None
"""
LABELS = """
import json
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
images = np.load("images.npy")
parts = [images[start : start + 500] for start in range(0, len(images), 500)]
labels = [session.run(["label"], {NAME: part})[0] for part in parts]
print(json.dumps(np.concatenate(labels).tolist()))
"""


def run_alone(code: str, folder: Path) -> str:
    """Run code in `folder` and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def edge_labels(folder: Path, name: str, images_NHWC: np.ndarray) -> list[str]:
    """Return the labels that the edge model in `folder` predicts for images.

    name: the input of the model. images: uint8 [N, H, W, C].
    """
    np.save(folder / "images.npy", images_NHWC)
    labels: list[str] = json.loads(run_alone(LABELS.replace("NAME", repr(name)), folder))
    return labels
