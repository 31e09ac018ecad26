"""The OpenAPI description of the HTTP interface, with example inputs for the served model."""

import base64
import io
import json
import math
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml
from PIL import Image
from swagger_ui_bundle import swagger_ui_path

from serve.errors import NotFound
from serve.http.app import Response
from serve.http.request import Request
from train.bundle.manifest import Manifest, TensorMetadata
from train.values.ragged import FREE

DOCUMENT = Path(__file__).with_name("openapi.yaml")
ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}

# All parts of the page come from this server, so it needs no internet access. The key is the one
# that the console stores for the tab.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Halyard: API</title>
<link rel="stylesheet" href="/docs/assets/swagger-ui.css">
</head>
<body>
{note}
<div id="ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({{
    url: "{base}/openapi.json", dom_id: "#ui", defaultModelsExpandDepth: -1,
    requestInterceptor: (request) => {{
        const key = sessionStorage.getItem("halyard key");
        if (key && !request.headers.Authorization) {{
            request.headers.Authorization = `Bearer ${{key}}`;
        }}
        return request;
    }},
}})
</script>
</body>
</html>
"""
NOTE = '<p>This server requires a key. <a href="/">Enter it in the console</a>, then return.</p>'


def docs_page(path: str, *, needs_key: bool) -> str:
    """Return the API page at a path that ends in /docs; it shows openapi.json in the same folder.

    needs_key: whether to show a note that the server requires a key.
    """
    base = quote(path.removesuffix("/docs"))
    return PAGE.format(base=base, note=NOTE if needs_key else "")


def docs_index(models: Sequence[str]) -> str:
    """Return a page with links to the models' API pages; without models, to the console."""
    links = "".join(
        f'<li><a href="/v2/models/{quote(model)}/docs">{escape(model)}</a></li>' for model in models
    )
    body = f"<ul>{links}</ul>" if models else NOTE
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Halyard</title>'
        f"<h1>Models</h1>{body}</html>"
    )


async def docs_file(request: Request) -> Response:
    """Return a static file of the page. Raises NotFound if there is no such file."""
    name = request.path.rpartition("/")[2]
    if name not in ASSETS:
        raise NotFound(f"/docs/assets/{name[:100]} does not exist. See /docs.")
    return Response(_file(name), content_type=ASSETS[name])


@cache
def _file(name: str) -> bytes:
    return Path(swagger_ui_path, name).read_bytes()


def openapi_document(manifest: Manifest) -> dict[str, Any]:
    """Return the OpenAPI 3.0 document for one model: openapi.yaml with the model's inputs."""
    name = manifest.name
    document: dict[str, Any] = json.loads(_document().replace("MODEL", name))
    document["info"]["version"] = manifest.created
    for path, example in (
        (f"/v2/models/{name}/infer", _v2(manifest)),
        (f"/v1/models/{name}:predict", _v1(manifest)),
    ):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        body["example"] = example
    return document


@cache
def _document() -> str:
    return json.dumps(yaml.safe_load(DOCUMENT.read_text()))


def _v2(manifest: Manifest) -> dict[str, Any]:
    return {"inputs": [_example(tensor) for tensor in manifest.inputs]}


def _example(tensor: TensorMetadata) -> dict[str, Any]:
    if _is_image(tensor):
        return {
            "name": tensor.name,
            "shape": [1],
            "datatype": "BYTES",
            "parameters": {"content_type": "base64"},
            "data": [_png(tensor)],
        }
    return {
        "name": tensor.name,
        "shape": [1, *_sizes(tensor)],
        "datatype": tensor.datatype,
        "data": [_EXAMPLES.get(tensor.datatype, 0)] * math.prod(_sizes(tensor)),
    }


def _v1(manifest: Manifest) -> dict[str, Any]:
    return {
        "instances": [
            {
                tensor.name: {"b64": _png(tensor)}
                if _is_image(tensor)
                else np.full(_sizes(tensor), _EXAMPLES.get(tensor.datatype, 0)).tolist()
                for tensor in manifest.inputs
            }
        ]
    }


def _sizes(tensor: TensorMetadata) -> list[int]:
    """Return the shape of an example without the batch dimension; a free length is 2."""
    return [2 if size == FREE else size for size in tensor.shape[1:]]


# Example values by datatype. For strings it is null (unknown), which every model accepts.
_EXAMPLES = {"BYTES": None, "BOOL": True, "FP64": 1.5, "FP32": 1.5}


def _is_image(tensor: TensorMetadata) -> bool:
    return tensor.datatype == "UINT8" and len(tensor.shape) == 4


def _png(tensor: TensorMetadata) -> str:
    """Return a grey gradient of the input's size, or a square, as a PNG in base64."""
    _, height, width, channels = tensor.shape
    height = width if height == FREE else height
    slope_HW = np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)
    image = Image.fromarray(slope_HW).convert("L" if channels == 1 else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
