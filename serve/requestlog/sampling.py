"""Fractions of requests and records, chosen by keyed hashes: clients cannot choose theirs."""

import hashlib
from functools import cache

from cluster import auth

# What is chosen; what is chosen for one purpose says nothing about another.
LOG, ROLLOUT, HELD_OUT = "request log", "rollout", "held out"


@cache
def _key(purpose: str) -> bytes:
    # Equal on all replicas and in later commands. Without a token, anybody could compute it.
    return hashlib.sha256(auth.derive_secret(f"fraction: {purpose}").encode()).digest()


def in_fraction(content: str | bytes, fraction: float, purpose: str) -> bool:
    """Whether a content is in a fraction of all: always the same ones, and more as it grows."""
    content = content.encode(errors="replace") if isinstance(content, str) else content
    digest = hashlib.blake2b(content, digest_size=8, key=_key(purpose)).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
