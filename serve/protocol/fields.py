"""Fields of a request against those of the model: what is left out, and what is unknown."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Literal, TypeVar

from serve.errors import BadRequest
from train.bundle.manifest import Manifest
from train.values.records import plain_name

UnknownFields = Literal["ignore", "refuse"]
ALIKE = 0.75

T = TypeVar("T")


def plain_fields(given: Mapping[str, T], manifest: Manifest, where: str) -> Mapping[str, T]:
    """Return fields by the names that training gave them: without spaces at their ends, in
    Unicode's composed form. Raises BadRequest where a field is there twice.
    """
    known = {tensor.name for tensor in manifest.inputs}
    if given.keys() <= known:
        return given
    found: dict[str, T] = {}
    for name, value in given.items():
        plain = name if name in known else plain_name(name)
        if plain in found:
            raise BadRequest(f"{where} has '{plain[:100]}' twice.")
        found[plain] = value
    return found


def match_fields(
    given: Collection[str], manifest: Manifest, unknown: UnknownFields, where: str
) -> list[str]:
    """Return the fields that are left out, whose values are missing.

    Raises BadRequest where a field is left out that was never missing in training, an unknown one
    may be one that is left out, or unknown ones are refused.
    """
    known = [tensor.name for tensor in manifest.inputs]
    left_out = [name for name in known if name not in given]
    extra = [name for name in given if name not in known]
    expected = f"'{manifest.name}' takes {', '.join(known)}"
    for name in left_out:
        lower = {each.lower().replace(" ", "_"): each for each in extra}
        alike = get_close_matches(name.lower().replace(" ", "_"), lower, 1, ALIKE)
        hint = f", but '{lower[alike[0]][:100]}'" if alike else ""
        if alike or name not in manifest.nullable:
            raise BadRequest(
                f"{where} has no '{name}'{hint}; {expected}. Send null where a value is not known."
            )
    if extra and unknown == "refuse":
        raise BadRequest(f"{where} has '{extra[0][:100]}'; {expected} and no others.")
    return left_out
