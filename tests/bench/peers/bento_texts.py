"""BentoML: adaptive batching of texts, two workers. The body is passed on as it is received."""

import os
from typing import Any

import bentoml
from bentoml import IODescriptor
from starlette.requests import Request

from tests.bench.peers.onnx_model import answer
from tests.bench.peers.text_model import TextModel


class RawText(IODescriptor):
    texts: list[Any]

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> "RawText":
        return cls.model_construct(texts=[await request.body()])


@bentoml.service(workers=2, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self.model = TextModel()

    @bentoml.api(batchable=True, max_batch_size=int(os.environ["BATCH"]), input_spec=RawText)
    def predict(self, texts: list[Any]) -> list[dict[str, Any]]:
        tokens_BL = self.model.pad([self.model.tokens(text) for text in texts])
        return [answer(row) for row in self.model.probabilities(tokens_BL)]
