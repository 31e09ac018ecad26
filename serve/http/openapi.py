"""The description of the HTTP interface, with an example of the served model's own inputs."""

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

DOCUMENT = Path(__file__).with_name("openapi.yaml")
ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}

# The page's parts come from the server itself: it works without the internet. The key is the one
# that the console keeps for the tab.
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
NOTE = '<p>This server asks for a key. <a href="/">Give it in the console</a>, then come back.</p>'


def docs_page(path: str, *, needs_key: bool) -> str:
    """Return the page at a path that ends in /docs, of the document beside it."""
    base = quote(path.removesuffix("/docs"))
    return PAGE.format(base=base, note=NOTE if needs_key else "")


def docs_index(models: Sequence[str]) -> str:
    """Return a page that leads to the page of each model; with none, to the console."""
    links = "".join(
        f'<li><a href="/v2/models/{quote(model)}/docs">{escape(model)}</a></li>' for model in models
    )
    body = f"<ul>{links}</ul>" if models else NOTE
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Halyard</title>'
        f"<h1>Models</h1>{body}</html>"
    )


async def docs_file(request: Request) -> Response:
    """A file of the page. Raises NotFound."""
    name = request.path.rpartition("/")[2]
    if name not in ASSETS:
        raise NotFound(f"/docs/assets/{name[:100]}: there is nothing here. See /docs.")
    return Response(_file(name), content_type=ASSETS[name])


@cache
def _file(name: str) -> bytes:
    return Path(swagger_ui_path, name).read_bytes()


def openapi_document(manifest: Manifest) -> dict[str, Any]:
    """Return the OpenAPI 3.0 document for one model: openapi.yaml, with the model's inputs."""
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
        "shape": [1, *tensor.shape[1:]],
        "datatype": tensor.datatype,
        "data": [_EXAMPLES.get(tensor.datatype, 0)] * math.prod(tensor.shape[1:]),
    }


def _v1(manifest: Manifest) -> dict[str, Any]:
    return {
        "instances": [
            {
                tensor.name: {"b64": _png(tensor)}
                if _is_image(tensor)
                else np.full(tensor.shape[1:], _EXAMPLES.get(tensor.datatype, 0)).tolist()
                for tensor in manifest.inputs
            }
        ]
    }


# A value that is not known is one that every model takes.
_EXAMPLES = {"BYTES": None, "BOOL": True, "FP64": 1.5, "FP32": 1.5}


def _is_image(tensor: TensorMetadata) -> bool:
    return tensor.datatype == "UINT8" and len(tensor.shape) == 4


def _png(tensor: TensorMetadata) -> str:
    """A grey slope in the input's size, as a base64 PNG."""
    _, height, width, channels = tensor.shape
    slope_HW = np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)
    image = Image.fromarray(slope_HW).convert("L" if channels == 1 else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
