"""FastAPI and ONNX Runtime without a serving framework: one image at a time, two workers."""

import os

import orjson
from fastapi import FastAPI, Request, Response

from tests.bench.peers.onnx_model import OnnxModel, answer

model = OnnxModel(os.environ["MODEL"])
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> Response:
    image_HWC = model.image(await request.body())
    # On the event loop: a thread would cost more than it saves, as nothing else runs meanwhile.
    (probabilities_K,) = model.probabilities(image_HWC[None])
    return Response(orjson.dumps(answer(probabilities_K)), media_type="application/json")
