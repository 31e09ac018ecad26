"""The V2 protocol's requests to load a model."""

from collections.abc import Mapping
from typing import Any

import orjson

from serve.errors import BadRequest

ALLOW_INTERFACE_CHANGE = "allow_interface_change"
EXPECTED = 'expected nothing or {"parameters": {"allow_interface_change": true}}'


def decode_load(body: bytes) -> bool:
    """Return the parameter of a load in a JSON body, which may be empty. Raises BadRequest."""
    try:
        given = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error}); {EXPECTED}.") from error
    parameters = given.get("parameters", {}) if isinstance(given, dict) else None
    if not isinstance(parameters, dict) or given.keys() - {"parameters"}:
        raise BadRequest(f"the body is another object; {EXPECTED}.")
    return allows_interface_change(parameters)


def allows_interface_change(parameters: Mapping[str, Any]) -> bool:
    """Return the one parameter that load takes, False by default. Raises BadRequest."""
    if unknown := sorted(parameters.keys() - {ALLOW_INTERFACE_CHANGE}):
        raise BadRequest(
            f"load takes no parameters but {ALLOW_INTERFACE_CHANGE}; "
            f"{', '.join(unknown)[:100]} came."
        )
    allow = parameters.get(ALLOW_INTERFACE_CHANGE, False)
    if not isinstance(allow, bool):
        raise BadRequest(f"the parameter {ALLOW_INTERFACE_CHANGE} is true or false.")
    return allow
