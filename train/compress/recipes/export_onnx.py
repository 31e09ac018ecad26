"""Export: torch → ONNX, checked against torch."""

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
    """The net cannot be exported, or answers differently once it is."""


def to_onnx(net: nn.Module, specs: tuple[TensorSpec, ...], sample: Arrays, path: Path) -> None:
    """Write `net` to `path` with a free batch dimension and the output "logits" [N, K].

    sample: a batch of encoded inputs, at least two rows, on which both must agree.
    Raises ExportError, naming the operator, if there is one that ONNX has no form for, and when the
    answers differ by more than PARITY.
    """
    net = net.eval().cpu()
    tensors = tuple(torch.from_numpy(sample[spec.name]) for spec in specs)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    shapes = tuple({0: batch} for _ in specs)
    try:
        with _quiet():
            torch.onnx.export(
                net,
                tensors,
                str(path),
                input_names=[spec.name for spec in specs],
                output_names=["logits"],
                # A net takes all its inputs as one *inputs, or each by a name of its own.
                dynamic_shapes=(shapes,) if _takes_any(net) else shapes,
                dynamo=True,
                external_data=False,
            )
        inputs = {spec.name: sample[spec.name] for spec in specs}
        logits = OnnxRuntimeEngine.load(path, num_threads=1).run(inputs)["logits"]
    except OSError:
        raise
    except Exception as error:  # the exporter and ONNX Runtime raise many kinds
        raise ExportError(_reason(error)) from error
    with torch.no_grad():
        expected = net(*tensors).numpy()
    difference = float(np.max(np.abs(logits - expected)))
    if not difference <= PARITY * max(1.0, float(np.max(np.abs(expected)))):
        raise ExportError(
            f"the exported net differs from torch by {difference:.3g} on {len(logits)} records; "
            "an operator of the net is exported wrongly."
        )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; it names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    operator = re.search(r"op='([\w.]+)'", str(error))
    what = " ".join(str(error).split())[:200]
    return f"operator {operator[1]} has no form in ONNX" if operator else what


def _takes_any(net: nn.Module) -> bool:
    parameters = inspect.signature(net.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The exporter prints its progress and logs what it skips."""
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
