"""LitServe: dynamic batching of texts, two workers."""

import os
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body

from tests.bench.peers.onnx_model import answer
from tests.bench.peers.text_model import TextModel


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = TextModel()

    # The annotation makes LitServe pass the raw body; without it, the body is parsed as JSON.
    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        return self.model.tokens(request)

    def batch(self, texts: list[np.ndarray]) -> np.ndarray:
        return self.model.pad(texts)

    def predict(self, tokens_BL: np.ndarray) -> np.ndarray:
        return self.model.probabilities(tokens_BL)

    def unbatch(self, probabilities_BK: np.ndarray) -> list[np.ndarray]:
        return list(probabilities_BK)

    def encode_response(self, probabilities_K: np.ndarray) -> dict[str, Any]:
        return answer(probabilities_K)


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(max_batch_size=int(os.environ["BATCH"]), batch_timeout=0.005),
        accelerator="cpu",
        workers_per_device=2,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        generate_client_file=False,
        log_level="warning",
    )
