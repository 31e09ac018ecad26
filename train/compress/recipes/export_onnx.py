"""Export of a network from torch to ONNX, checked against torch. Shapes: N records, K outputs."""

import contextlib
import inspect
import io
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.tasks import Arrays, TensorSpec

# Largest difference between torch and ONNX Runtime in fp32, relative to the largest output.
PARITY = 1e-3


class ExportError(RuntimeError):
    """The network cannot be exported, or the exported file computes different outputs."""


def to_onnx(net: nn.Module, specs: tuple[TensorSpec, ...], sample: Arrays, path: Path) -> None:
    """Write `net` to `path` with a dynamic batch dimension and the output "logits", float32 [N, K].

    A free length of an input is a dynamic dimension too.

    sample: encoded inputs [N, ...] by input name, N ≥ 2, used to trace and to check the export.
    Raises ExportError if ONNX does not support an operator, which the message names, or if the
    outputs of torch and ONNX Runtime differ by more than PARITY.
    """
    net = net.eval().cpu()
    # Tracing would take a length of 1 for a constant. Longer ones are not padded, because an
    # encoder may not have another position.
    sample = {
        spec.name: np.pad(sample[spec.name], [(0, 0), (0, 1), *[(0, 0)] * (len(spec.shape) - 1)])
        if spec.ragged and sample[spec.name].shape[1] == 1
        else sample[spec.name]
        for spec in specs
    }
    tensors = tuple(torch.from_numpy(array) for array in sample.values())
    batch = torch.export.Dim("batch", min=1, max=65_536)
    shapes = tuple(
        {0: batch, 1: torch.export.Dim(f"length{number}", min=1, max=65_536)}
        if spec.ragged
        else {0: batch}
        for number, spec in enumerate(specs)
    )
    try:
        with _quiet():
            torch.onnx.export(
                net,
                tensors,
                str(path),
                input_names=[spec.name for spec in specs],
                output_names=["logits"],
                # forward() has either one parameter *inputs or one parameter for each input.
                dynamic_shapes=(shapes,) if _takes_any(net) else shapes,
                dynamo=True,
                external_data=False,
                # This version has an operator for attention, which is faster than its parts.
                opset_version=23 if any(spec.ragged for spec in specs) else None,
            )
        logits = OnnxRuntimeEngine.load(path, num_threads=1).run(sample)["logits"]
    except OSError:
        raise
    except Exception as error:  # the exporter and ONNX Runtime raise many classes
        raise ExportError(_reason(error)) from error
    with torch.no_grad():
        expected = net(*tensors).numpy()
    difference = float(np.max(np.abs(logits - expected)))
    if not difference <= PARITY * max(1.0, float(np.max(np.abs(expected)))):
        raise ExportError(
            f"the exported network differs from torch by {difference:.3g} on {len(logits)} "
            "records; an operator is exported incorrectly."
        )


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one line, or only the operator if it names one."""
    while error.__cause__ is not None:
        error = error.__cause__
    operator = re.search(r"op='([\w.]+)'", str(error))
    what = " ".join(str(error).split())[:200]
    return f"ONNX does not support operator {operator[1]}" if operator else what


def _takes_any(net: nn.Module) -> bool:
    parameters = inspect.signature(net.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Suppress the exporter's progress output, warnings and logs."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
