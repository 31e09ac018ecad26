"""Static int8: weights per channel, activations by ranges measured on training records."""

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from train.tasks import Arrays
from train.tasks.records import num_rows

CALIBRATION_BATCH = 32


class _Batches(CalibrationDataReader):
    def __init__(self, inputs: Arrays) -> None:
        self._batches: Iterator[Arrays] = (
            {name: array[start : start + CALIBRATION_BATCH] for name, array in inputs.items()}
            for start in range(0, num_rows(inputs), CALIBRATION_BATCH)
        )

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)


def int8_static(source: Path, target: Path, calibration: Arrays) -> None:
    """Write the int8 form of the ONNX file `source` to `target`, as QDQ.

    Activations are QUInt8, as x86 multiplies unsigned by signed bytes fastest: with QInt8 the
    same net runs slower than fp32.
    """
    level = logging.getLogger().level
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        try:
            # The quantizer warns on the root logger about a step that has just been done.
            logging.getLogger().setLevel(logging.ERROR)
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                _Batches(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                calibrate_method=CalibrationMethod.MinMax,
            )
        finally:
            logging.getLogger().setLevel(level)
    onnx.checker.check_model(str(target))
