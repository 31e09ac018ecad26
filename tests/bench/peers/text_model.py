"""The model that every peer runs for texts: a tokenizer and an ONNX file, on one thread.

Shapes: B texts, L tokens of the longest, K classes.
"""

import os

import numpy as np
from tokenizers import Tokenizer

from tests.bench.peers.onnx_model import OnnxModel


class TextModel(OnnxModel):
    """Encodes texts as Halyard does, and pads a batch to its longest text."""

    def __init__(self) -> None:
        super().__init__(os.environ["MODEL"])
        self._tokenizer = Tokenizer.from_file(os.environ["TOKENIZER"])
        self._tokenizer.enable_truncation(int(os.environ["MAX_TOKENS"]))

    def tokens(self, text: bytes) -> np.ndarray:
        """Return the token numbers of a text, int32 [L], at least one."""
        ids = self._tokenizer.encode(text.decode()).ids
        return np.array(ids, np.int32) + 1 if ids else np.zeros(1, np.int32)

    def pad(self, texts: list[np.ndarray]) -> np.ndarray:
        """Return int32 [B, L] of B texts."""
        padded_BL = np.zeros((len(texts), max(map(len, texts))), np.int32)
        for row_L, tokens in zip(padded_BL, texts, strict=True):
            row_L[: len(tokens)] = tokens
        return padded_BL
