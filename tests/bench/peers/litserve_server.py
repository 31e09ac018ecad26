"""LitServe: dynamic batching, two workers, as its documentation advises for high throughput."""

import os
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body

from tests.bench.peers.onnx_model import OnnxModel, answer


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = OnnxModel(os.environ["MODEL"])

    # The annotation makes LitServe pass the raw body; without it, the body is parsed as JSON.
    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        return self.model.image(request)

    def batch(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack(images)

    def predict(self, images_BHWC: np.ndarray) -> np.ndarray:
        return self.model.probabilities(images_BHWC)

    def unbatch(self, probabilities_BK: np.ndarray) -> list[np.ndarray]:
        return list(probabilities_BK)

    def encode_response(self, probabilities_K: np.ndarray) -> dict[str, Any]:
        return answer(probabilities_K)


if __name__ == "__main__":
    server = litserve.LitServer(
        # The best of 0, 2, 5 and 10 ms with 32 connections.
        Api(max_batch_size=32, batch_timeout=0.005),
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
