"""Fractions of requests and records, selected by keyed hashes that clients cannot predict."""

import hashlib
from functools import cache

from cluster import auth

# Purposes. The selections for different purposes are independent of each other.
LOG, ROLLOUT, HELD_OUT = "request log", "rollout", "held out"


@cache
def _key(purpose: str) -> bytes:
    # The same on all replicas and in later commands; clients lack the token and cannot compute it.
    return hashlib.sha256(auth.derive_secret(f"fraction: {purpose}").encode()).digest()


def in_fraction(content: str | bytes, fraction: float, purpose: str) -> bool:
    """Return whether a content is in the selected fraction.

    The result is the same in every process, and a content stays selected if the fraction grows.
    """
    content = content.encode(errors="replace") if isinstance(content, str) else content
    digest = hashlib.blake2b(content, digest_size=8, key=_key(purpose)).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
