"""The model that every peer runs: an ONNX file with uint8 images as input, on one thread.

Shapes: B images of H×W pixels with C channels, K classes.
"""

from typing import Any

import numpy as np
import onnxruntime


class OnnxModel:
    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # A spinning thread would take the CPU from the other worker.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        (self._input,) = self._session.get_inputs()

    def image(self, raw: bytes) -> np.ndarray:
        """Return the image, uint8 [H, W, C], that raw bytes contain."""
        return np.frombuffer(raw, np.uint8).reshape(self._input.shape[1:])

    def probabilities(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Return float32 [B, K], one row per image of uint8 [B, H, W, C]."""
        (logits_BK,) = self._session.run(None, {self._input.name: images_BHWC})
        raised_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
        return raised_BK / raised_BK.sum(axis=1, keepdims=True)


def answer(probabilities_K: np.ndarray) -> dict[str, Any]:
    """Return the response of every peer, to be sent as JSON, for float32 [K]."""
    return {"label": int(probabilities_K.argmax()), "probabilities": probabilities_K.tolist()}
