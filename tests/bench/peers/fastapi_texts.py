"""FastAPI and ONNX Runtime without a serving framework: one text at a time, two workers."""

import orjson
from fastapi import FastAPI, Request, Response

from tests.bench.peers.onnx_model import answer
from tests.bench.peers.text_model import TextModel

model = TextModel()
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> Response:
    tokens_L = model.tokens(await request.body())
    # On the event loop: a thread would cost more than it saves, as nothing else runs meanwhile.
    (probabilities_K,) = model.probabilities(tokens_L[None])
    return Response(orjson.dumps(answer(probabilities_K)), media_type="application/json")
