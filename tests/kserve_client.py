"""Call a server with KServe's own clients and print their predictions as JSON.

    KSERVE_PYTHON tests/kserve_client.py HTTP_URL GRPC_ADDRESS MODEL INPUT

The images are read from stdin as JSON, [N, H, W, C]. KServe requires other versions of protobuf and
pandas than this project, so KSERVE_PYTHON belongs to a separate environment.
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def main() -> None:
    url, address, model, name = sys.argv[1:]
    images = np.array(json.load(sys.stdin), np.uint8)
    rest = InferenceRESTClient(config=RESTConfig(protocol="v2"))
    tensor = InferInput(name, list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=False)
    request = InferRequest(model_name=model, infer_inputs=[tensor])
    by_rest = await rest.infer(url, request, model_name=model)
    ready = await rest.is_model_ready(url, model_name=model)
    v1 = InferenceRESTClient(config=RESTConfig(protocol="v1"))
    by_v1 = await v1.infer(url, {"instances": images.tolist()}, model_name=model)
    grpc = InferenceGRPCClient(url=address)
    by_grpc = await grpc.infer(InferRequest(model_name=model, infer_inputs=[_raw(name, images)]))
    print(
        json.dumps(
            {
                "ready": ready,
                "rest": _labels(by_rest),
                "v1": [prediction["label"] for prediction in by_v1["predictions"]],
                "grpc": _labels(by_grpc),
            }
        )
    )


def _raw(name: str, images: np.ndarray) -> InferInput:
    tensor = InferInput(name, list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=True)
    return tensor


def _labels(response: object) -> list[str]:
    output = next(output for output in response.outputs if output.name == "label")  # type: ignore[attr-defined]
    return [
        value.decode() if isinstance(value, bytes) else str(value)
        for value in output.as_numpy().ravel()
    ]


if __name__ == "__main__":
    asyncio.run(main())
