"""Modules of PyTorch that take rows of numbers. Shapes: N records, F features.

It runs in the isolated process.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from train.compress.recipes.export_onnx import ExportError, to_onnx
from train.importing.isolated import Unsuitable
from train.importing.onnx_file import choose_output
from train.importing.sample import Sample
from train.tasks import TensorSpec
from train.tasks.plugins import allow_modules, import_object

# Records that the export is traced with.
TRACED = 8


def adapt_module(
    path: Path, sample: Sample, target: Path, class_path: str, folder: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Construct a module, load its weights from safetensors, and write its ONNX graph to `target`.

    class_path: package.module:Class, importable from `folder`; its constructor takes no arguments,
    and forward takes all columns as one tensor, float32 [N, F].
    Returns what is known of it, and its own outputs for the sample, [N, …] by name. Raises
    Unsuitable if the module cannot be imported.
    """
    sys.path.insert(0, folder)
    allow_modules([class_path.partition(":")[0]])
    try:
        module = import_object(class_path)()
    except (ValueError, TypeError) as error:
        raise Unsuitable(f"'{class_path}' cannot be constructed: {error}") from error
    try:
        module.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise Unsuitable(f"the weights do not fit '{class_path}': {error}") from error
    names = sample.choose(None, len(sample.texts))
    features_NF = sample.matrix(names).astype(np.float32)
    with torch.inference_mode():
        try:
            found = module.eval()(torch.from_numpy(features_NF))
        except RuntimeError as error:
            raise Unsuitable(f"it does not take {len(names)} columns: {error}") from error

    def run(one: Sample) -> np.ndarray:
        with torch.inference_mode():
            outputs: torch.Tensor = module(torch.from_numpy(one.matrix(names).astype(np.float32)))
        return outputs.numpy()

    if not isinstance(found, torch.Tensor):
        raise Unsuitable(f"it returns a {type(found).__name__} instead of a tensor")
    spec = TensorSpec("features", "FP32", (len(names),))
    rows = np.resize(features_NF, (TRACED, len(names)))
    try:
        to_onnx(module, (spec,), {"features": np.nan_to_num(rows)}, target)
    except ExportError as error:
        raise Unsuitable(f"it cannot be exported to ONNX: {error}") from error
    facts: dict[str, Any] = {
        "library": f"PyTorch {torch.__version__}",
        "model": class_path,
        "layout": "matrix",
        "columns": names,
        "categories": [],
        "known": {},
        "limits": sample.find_limits(names, (), run),
    }
    chosen, outputs = choose_output({"logits": found.numpy()}, len(features_NF))
    return facts | chosen, outputs
