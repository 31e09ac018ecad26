"""Ray Serve as in its documentation: @serve.batch, a Starlette request and Ray's own proxy."""

import numpy as np
from ray import serve
from starlette.requests import Request

from tests.bench.peers.onnx_model import OnnxModel, answer


# Concurrent requests per replica. The default of 5 would limit batches to 5 rows.
@serve.deployment(num_replicas=2, max_ongoing_requests=64)
class Classifier:
    def __init__(self, model: str) -> None:
        self.model = OnnxModel(model)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def predict(self, images: list[np.ndarray]) -> list[dict]:
        return [answer(row) for row in self.model.probabilities(np.stack(images))]

    async def __call__(self, request: Request) -> dict:
        return await self.predict(self.model.image(await request.body()))


def app(arguments: dict[str, str]) -> serve.Application:
    return Classifier.bind(arguments["model"])
