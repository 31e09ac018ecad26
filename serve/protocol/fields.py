"""Fields of a request against those of the model: what is left out, and what is unknown."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Literal

from serve.errors import BadRequest
from train.bundle.manifest import Manifest

UnknownFields = Literal["ignore", "refuse"]
ALIKE = 0.75


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
