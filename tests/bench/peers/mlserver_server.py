"""MLServer: a custom runtime, adaptive batching, two inference workers.

Its REST API has no binary tensors, so images are sent as base64 in JSON.
"""

import os

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from tests.bench.peers.onnx_model import OnnxModel


class Runtime(MLModel):
    async def load(self) -> bool:
        self.model = OnnxModel(os.environ["MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        raws_B = Base64Codec.decode_input(payload.inputs[0])
        probabilities_BK = self.model.probabilities(np.stack([*map(self.model.image, raws_B)]))
        outputs = {"label": probabilities_BK.argmax(axis=1), "probabilities": probabilities_BK}
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, array) for name, array in outputs.items()],
        )
