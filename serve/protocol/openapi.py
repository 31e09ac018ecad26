"""The description of the HTTP interface, with an example of the served model's own inputs."""

import base64
import io
import math
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image
from swagger_ui_bundle import swagger_ui_path

from serve.errors import NotFound
from serve.protocol.http import Answer
from serve.protocol.request import Request
from train.bundle.manifest import Manifest, Tensor
from train.tasks.records import DTYPES

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


def page(path: str, *, needs_key: bool) -> str:
    """Return the page at a path that ends in /docs, of the document beside it."""
    base = quote(path.removesuffix("/docs"))
    return PAGE.format(base=base, note=NOTE if needs_key else "")


def list_page(models: Sequence[str]) -> str:
    """Return a page that leads to the page of each model; with none, to the console."""
    links = "".join(
        f'<li><a href="/v2/models/{quote(model)}/docs">{escape(model)}</a></li>' for model in models
    )
    body = f"<ul>{links}</ul>" if models else NOTE
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Halyard</title>'
        f"<h1>Models</h1>{body}</html>"
    )


async def asset(request: Request) -> Answer:
    """A file of the page. Raises NotFound."""
    name = request.path.rpartition("/")[2]
    if name not in ASSETS:
        raise NotFound(f"/docs/assets/{name[:100]}: there is nothing here. See /docs.")
    return Answer(_file(name), content_type=ASSETS[name])


@cache
def _file(name: str) -> bytes:
    return Path(swagger_ui_path, name).read_bytes()


def document(manifest: Manifest) -> dict[str, Any]:
    """Return the OpenAPI 3.0 document for one model."""
    name = manifest.name
    model, repository = f"/v2/models/{name}", f"/v2/repository/models/{name}"
    infer = _post("Predict by tensors (Open Inference Protocol v2)", "Tensors", _v2(manifest))
    predict = _post("Predict by records (KServe V1)", "Records", _v1(manifest))
    return {
        "openapi": "3.0.3",
        "info": {
            "title": f"Halyard: {name}",
            "version": manifest.created,
            "description": "Open Inference Protocol v2 and KServe V1.",
        },
        "security": [{}, {"key": []}],
        "paths": {
            f"{model}/infer": infer,
            f"/v1/models/{name}:predict": predict,
            model: _get("Inputs, outputs and versions of the model"),
            f"{model}/ready": _get("Whether the model answers"),
            f"{model}/config": _get("How the model is batched"),
            f"{model}/stats": _get("What was answered, drift, live accuracy and the candidate"),
            f"{model}/feedback": _post("Say what is true of a request", "Feedback", TRUTH),
            f"{model}/manifest": _get("What was trained, of which data, and how it measured"),
            "/v2": _get("Name and extensions of the server"),
            "/v2/models": _get("Names of the models"),
            "/v2/health/live": _get("Whether the server lives"),
            "/v2/health/ready": _get("Whether the server answers"),
            "/v2/repository/index": _change("Versions of the model and their state"),
            f"{repository}/load": _change("Serve what the registry has now"),
            f"{repository}/unload": _change("Answer 503 until it is loaded again"),
            "/metrics": {
                "get": {
                    "summary": "Metrics of all replicas, for Prometheus",
                    "responses": {
                        "200": {"description": "Metrics.", "content": {"text/plain": {}}},
                        **_errors("401", "429", "503"),
                    },
                }
            },
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


TRUTH = {"id": "the x-request-id of an answer", "truth": ["7"]}
SCHEMAS: dict[str, Any] = {
    "Feedback": {
        "type": "object",
        "required": ["id", "truth"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "string"},
            "truth": {"type": "array", "items": {}},
        },
    },
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
    },
    "Tensors": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["name", "shape", "datatype", "data"],
                    "properties": {
                        "name": {"type": "string"},
                        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                        "datatype": {"type": "string", "enum": sorted(DTYPES)},
                        "data": {"type": "array", "items": {}},
                        "parameters": {"type": "object"},
                    },
                },
            },
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}},
                },
            },
            "parameters": {
                "type": "object",
                "description": "timeout: microseconds that the answer is worth waiting for; "
                "priority: 1 goes first; binary_data_output: whether outputs are binary.",
            },
        },
    },
    "Records": {
        "type": "object",
        "required": ["instances"],
        "properties": {"instances": {"type": "array", "minItems": 1, "items": {}}},
    },
}
REASONS = {
    "400": "The request is wrong.",
    "401": "A key is needed.",
    "403": "The key is not for this.",
    "404": "No such model or version.",
    "408": "The body came too slowly.",
    "413": "The body is too large, or has too many rows.",
    "429": "The key has asked too often; see Retry-After.",
    "503": "Too much waits to answer in time, or the model is unloaded; see Retry-After.",
    "504": "No answer in time; see Retry-After.",
}
OBJECT = {"application/json": {"schema": {"type": "object"}}}


def _errors(*codes: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {code: {"description": REASONS[code], "content": content} for code in codes}


def _get(summary: str) -> dict[str, Any]:
    return {
        "get": {
            "summary": summary,
            "responses": {
                "200": {"description": "Yes.", "content": OBJECT},
                **_errors("401", "403", "404", "429", "503"),
            },
        }
    }


def _change(summary: str) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "responses": {
                "200": {"description": "Done.", "content": {"application/json": {"schema": {}}}},
                **_errors("400", "401", "403", "404", "429", "503"),
            },
        }
    }


def _post(summary: str, schema: str, example: dict[str, Any]) -> dict[str, Any]:
    body = {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": body}},
            "responses": {
                "200": {"description": "The answer.", "content": OBJECT},
                **_errors(*REASONS),
            },
        }
    }


def _v2(manifest: Manifest) -> dict[str, Any]:
    return {"inputs": [_example(tensor) for tensor in manifest.inputs]}


def _example(tensor: Tensor) -> dict[str, Any]:
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


def _is_image(tensor: Tensor) -> bool:
    return tensor.datatype == "UINT8" and len(tensor.shape) == 4


def _png(tensor: Tensor) -> str:
    """A grey slope in the input's size, as a base64 PNG."""
    _, height, width, channels = tensor.shape
    slope_HW = np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)
    image = Image.fromarray(slope_HW).convert("L" if channels == 1 else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
