"""Decoding of the V2 protocol's requests to load a model."""

from collections.abc import Mapping
from typing import Any

import orjson

from serve.errors import BadRequest

ALLOW_INTERFACE_CHANGE = "allow_interface_change"
EXPECTED = 'expected no body or {"parameters": {"allow_interface_change": true}}'


def decode_load(body: bytes) -> bool:
    """Return the parameter allow_interface_change of a JSON body; False if the body is empty.

    Raises BadRequest if the body is malformed or has other parameters.
    """
    try:
        given = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON ({error}); {EXPECTED}.") from error
    parameters = given.get("parameters", {}) if isinstance(given, dict) else None
    if not isinstance(parameters, dict) or given.keys() - {"parameters"}:
        raise BadRequest(f"the body is not a load request; {EXPECTED}.")
    return allows_interface_change(parameters)


def allows_interface_change(parameters: Mapping[str, Any]) -> bool:
    """Return the parameter allow_interface_change; False if it is absent.

    Raises BadRequest if it is not a boolean or there are other parameters.
    """
    if unknown := sorted(parameters.keys() - {ALLOW_INTERFACE_CHANGE}):
        raise BadRequest(
            f"load has the unknown parameters {', '.join(unknown)[:100]}; "
            f"expected only {ALLOW_INTERFACE_CHANGE}."
        )
    allow = parameters.get(ALLOW_INTERFACE_CHANGE, False)
    if not isinstance(allow, bool):
        raise BadRequest(f"parameter '{ALLOW_INTERFACE_CHANGE}' must be true or false.")
    return allow
