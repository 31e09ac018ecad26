"""BentoML: adaptive batching, two workers.

BentoML's own input types are JSON and files. Both are slower than the raw bytes that the other
servers receive here, so a custom input type passes the body on unchanged.
"""

import os
from typing import Any

import bentoml
import numpy as np
from bentoml import IODescriptor
from starlette.requests import Request

from tests.bench.peers.onnx_model import OnnxModel, answer


class RawImage(IODescriptor):
    images: list[Any]

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> "RawImage":
        return cls.model_construct(images=[await request.body()])


@bentoml.service(workers=2, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self.model = OnnxModel(os.environ["MODEL"])

    @bentoml.api(batchable=True, max_batch_size=32, input_spec=RawImage)
    def predict(self, images: list[Any]) -> list[dict[str, Any]]:
        images_BHWC = np.stack([self.model.image(raw) for raw in images])
        return [answer(row) for row in self.model.probabilities(images_BHWC)]
