"""Recipes: how each variant is built from a trained network."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch

from cluster.errors import UserError
from train import nets
from train.compress.recipes import quantize_weight_only
from train.compress.recipes.export_onnx import ExportError
from train.compress.recipes.quantize_static import LAYERS, StaticQuantizer
from train.compress.recipes.variant_builder import (
    BaseNet,
    BuiltVariant,
    Recipe,
    VariantBuilder,
    VariantSkipped,
)
from train.config import Config
from train.nets import torch_engine
from train.tasks import ClassTarget, Task


def _fp32(builder: VariantBuilder, variant: str, *, base: str = "fp32") -> BuiltVariant:
    """Export the base network unchanged to ONNX; use torch if it cannot be exported."""
    found = builder.base(base)
    try:
        source = builder.onnx(found)
    except ExportError as error:
        net = nets.folded_net(copy.deepcopy(found.net))
        path = torch_engine.save_net(
            net, found.config, builder.task, "fp32", builder.folder(variant)
        )
        return BuiltVariant(path, {"not_exported": str(error)})
    return BuiltVariant(Path(shutil.copyfile(source, builder.folder(variant) / "model.onnx")))


def _torch(
    builder: VariantBuilder, variant: str, *, precision: torch_engine.Precision, gpu: bool
) -> BuiltVariant:
    if gpu and not torch.cuda.is_available():
        raise VariantSkipped(f"{variant} needs a GPU, and this machine has none")
    base = builder.base("fp32")
    net = nets.folded_net(copy.deepcopy(base.net))
    return BuiltVariant(
        torch_engine.save_net(net, base.config, builder.task, precision, builder.folder(variant))
    )


def _of_onnx(
    builder: VariantBuilder, variant: str, *, write: Callable[[Path, Path], None]
) -> BuiltVariant:
    source = _with_layers(builder, builder.base("fp32"))
    path = builder.folder(variant) / "model.onnx"
    write(source, path)
    return BuiltVariant(path)


def _with_layers(builder: VariantBuilder, base: BaseNet) -> Path:
    """Return the ONNX file of a base. Raises VariantSkipped if it has no layers to quantize."""
    path = builder.onnx(base)
    if not any(node.op_type in LAYERS for node in onnx.load(path).graph.node):
        raise VariantSkipped("a model of trees or a linear one has no layers to quantize")
    return path


def _int8_static(builder: VariantBuilder, variant: str, *, base: str = "fp32") -> BuiltVariant:
    """Quantize to static int8, with as few layers in float as the gate accepts.

    If too many layers would have to stay in float, quantization-aware training is tried. The
    result is compared with the float version of the base, not with fp32, so that a drop caused by
    pruning or distillation does not count.
    """
    found = builder.base(base)
    reference = _with_layers(builder, found)
    path = builder.folder(variant) / "model.onnx"
    made = _kept_where_needed(builder, _calibrated(builder, found), reference, path)
    if made is None and builder.config.compress.qat_epochs:
        quantizer = _calibrated(builder, builder.aware(found))
        made = _kept_where_needed(builder, quantizer, reference, path, trained=True)
        return BuiltVariant(
            path, {**(made or {}), "qat_epochs": builder.config.compress.qat_epochs}
        )
    return BuiltVariant(path, made or {})


def _kept_where_needed(
    builder: VariantBuilder,
    quantizer: StaticQuantizer,
    reference: Path,
    path: Path,
    *,
    trained: bool = False,
) -> dict[str, Any] | None:
    """Write the accepted int8 version with the fewest layers in float, and describe it.

    Returns None if no version with up to half of the layers in float is accepted. The written
    version then has only the layers of `StaticQuantizer.ruling` in float.
    """
    layers = quantizer.most_sensitive()
    least = len(quantizer.ruling(layers))
    counts = [least, *(2**n for n in range(len(layers)) if least < 2**n <= len(layers) // 2)]
    for count in counts:
        quantizer.write(path, layers[:count])
        if builder.passes(path, reference, trained):
            error = quantizer.error_without(layers[:count])
            kept = {"kept_float": layers[:count]} if count else {}
            return {"calibration": quantizer.method, "error": round(error, 6), **kept}
    quantizer.write(path, layers[:least])
    return None


def _calibrated(builder: VariantBuilder, base: BaseNet) -> StaticQuantizer:
    scratch = builder.scratch / f"static-{base.name}"
    scratch.mkdir(exist_ok=True)
    methods = builder.config.compress.calibration
    return StaticQuantizer.calibrate(
        builder.onnx(base), scratch, builder.calibration, builder.trial, methods
    )


RECIPES: dict[str, Recipe] = {
    "fp32": _fp32,
    "bf16": partial(_torch, precision="bf16", gpu=False),
    "fp16": partial(_torch, precision="fp16", gpu=True),
    "int8": partial(_torch, precision="int8", gpu=True),
    "fp8": partial(_torch, precision="fp8", gpu=True),
    "int8_static": _int8_static,
    "int8_dynamic": partial(_of_onnx, write=quantize_weight_only.int8_dynamic),
    "int8_weights": partial(_of_onnx, write=quantize_weight_only.int8_weights),
    "pruned": partial(_fp32, base="pruned"),
    "pruned_int8": partial(_int8_static, base="pruned"),
    "distilled": partial(_fp32, base="distilled"),
    "distilled_int8": partial(_int8_static, base="distilled"),
}


def check_calibration(config: Config, task: Task) -> None:
    """Raise UserError if compress.calibration_records is too small to include every class."""
    least = len(task.target.classes) if isinstance(task.target, ClassTarget) else 2
    count = config.compress.calibration_records
    if count < least:
        raise UserError(
            f"compress.calibration_records is {count}, but there are {least} classes; give at "
            f"least {least}, so that calibration includes every class."
        )
