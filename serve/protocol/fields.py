"""Comparison of a request's fields with the model's: missing, unknown and repeated fields."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Literal, TypeVar

from serve.errors import BadRequest
from train.bundle.manifest import Manifest
from train.values.records import plain_name

UnknownFields = Literal["ignore", "refuse"]
# Similarity (difflib's ratio) from which an unknown name counts as a misspelled field.
ALIKE = 0.75

T = TypeVar("T")


def plain_fields(given: Mapping[str, T], manifest: Manifest, where: str) -> Mapping[str, T]:
    """Return the fields under normalized names, which are those that training uses.

    Names are stripped of spaces at both ends and converted to Unicode's composed form (NFC).
    Raises BadRequest if two fields have the same normalized name.
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
    """Return the model's fields that a request omits; they count as missing values.

    Raises BadRequest if an omitted field was never missing in training, if an unknown field looks
    like a misspelled one, or if there are unknown fields and `unknown` is "refuse".
    """
    known = [tensor.name for tensor in manifest.inputs]
    left_out = [name for name in known if name not in given]
    extra = [name for name in given if name not in known]
    expected = f"'{manifest.name}' expects {', '.join(known)}"
    for name in left_out:
        lower = {each.lower().replace(" ", "_"): each for each in extra}
        alike = get_close_matches(name.lower().replace(" ", "_"), lower, 1, ALIKE)
        hint = f", but has '{lower[alike[0]][:100]}'" if alike else ""
        if alike or name not in manifest.nullable:
            raise BadRequest(
                f"{where} has no '{name}'{hint}; {expected}. Send null for an unknown value."
            )
    if extra and unknown == "refuse":
        raise BadRequest(
            f"{where} has the unknown field '{extra[0][:100]}'; {expected} and no other fields."
        )
    return left_out
