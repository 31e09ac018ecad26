"""Who may ask: bearer keys, kept as hashes in a file.

    python -m serve.security NAME --file keys.yaml [--models a,b] [--rate 100] [--admin]

makes a key, shows it once, and adds its hash to the file.
"""

import argparse
import hashlib
import hmac
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import EXIT_USER_ERROR, UserError
from serve.errors import Forbidden, RateLimited, Unauthorized

SCHEME = "bearer "
PREFIX = "hk_"


class Key(BaseModel):
    """One client's key. The key itself is random and long, so one round of SHA-256 keeps it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    models: list[str] | None = Field(None, description="Models it may ask; all when not given.")
    rate: float | None = Field(None, gt=0, description="Requests per second of each replica.")
    admin: bool = Field(False, description="Whether it may load and unload models.")


class Bucket:
    """A token bucket that holds one second's worth."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = max(rate, 1.0)
        self._at: float | None = None

    def take(self, now: float) -> float:
        """Take a token; return 0, or how many seconds to wait for one."""
        if self._at is not None:
            filled = self._tokens + (now - self._at) * self._rate
            self._tokens = min(max(self._rate, 1.0), filled)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0


class Keys:
    """The keys of a file."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys
        self._buckets = {key.sha256: Bucket(key.rate) for key in keys if key.rate is not None}

    @classmethod
    def load(cls, path: str) -> Self:
        """Raises UserError for a file that is missing or wrong."""
        return cls(_read(Path(path)))

    def check(self, authorization: str | None, now: float) -> Key:
        """Return the key of an Authorization header. Raises Unauthorized, RateLimited."""
        if authorization is None or not authorization.lower().startswith(SCHEME):
            raise Unauthorized("a key is needed: send the header 'Authorization: Bearer KEY'.")
        digest = _digest(authorization[len(SCHEME) :].strip())
        found = None
        # All are compared, whichever fits: the time it takes tells nothing.
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            raise Unauthorized("this key is not known.")
        if bucket := self._buckets.get(digest):
            wait_s = bucket.take(now)
            if wait_s:
                raise RateLimited(
                    f"key '{found.name}' may ask {found.rate:g} times a second.", wait_s
                )
        return found


def check_scope(key: Key | None, model: str, *, admin: bool = False) -> None:
    """Raises Forbidden for a model, or a change, that is not for this key."""
    if key is None:
        return
    if key.models is not None and model not in key.models:
        raise Forbidden(f"key '{key.name}' is not for model '{model[:100]}'.")
    if admin and not key.admin:
        raise Forbidden(f"key '{key.name}' may not load and unload models.")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _read(path: Path) -> list[Key]:
    try:
        entries = yaml.safe_load(path.read_text()) or []
        return [Key.model_validate(entry) for entry in entries]
    except OSError as error:
        raise UserError(f"keys file '{path}' cannot be read ({error.strerror}).") from error
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise UserError(
            f"keys file '{path}' is not a list of keys; make one with: "
            "python -m serve.security NAME"
        ) from error


def _write(path: Path, keys: list[Key]) -> None:
    entries = [key.model_dump(exclude_none=True) for key in keys]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        yaml.safe_dump(entries, file, sort_keys=False)
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="serve.security", description="Make a client's key.")
    parser.add_argument("name")
    parser.add_argument("--file", type=Path, default=Path("keys.yaml"))
    parser.add_argument("--models", help="models it may ask, such as digits,taxis; all without")
    parser.add_argument("--rate", type=float, help="requests per second of each replica")
    parser.add_argument("--admin", action="store_true", help="it may load and unload models")
    given = parser.parse_args(arguments)
    try:
        keys = _read(given.file) if given.file.exists() else []
        if any(key.name == given.name for key in keys):
            raise UserError(f"'{given.file}' has a key '{given.name}' already.")
        secret = PREFIX + secrets.token_urlsafe(32)
        models = given.models.split(",") if given.models else None
        try:
            key = Key(
                name=given.name,
                sha256=_digest(secret),
                models=models,
                rate=given.rate,
                admin=given.admin,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{first['loc'][0]}: {first['msg'].lower()}.") from error
        _write(given.file, [*keys, key])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    print(f"added '{given.name}' to {given.file}; the key is shown only now:", file=sys.stderr)
    print(secret)


if __name__ == "__main__":
    main()
