"""Bearer keys of clients, kept as hashes in a file.

    python -m serve.security NAME [--models a,b] [--rate 100] [--expires 90d] [--admin]
    python -m serve.security NAME --revoke

The first creates a key, prints it once, and adds its hash to the file; the second removes it.
Running servers apply both within seconds.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cluster import commit
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import UserError
from serve.errors import RateLimited, Unauthorized

logger = logging.getLogger(__name__)

SCHEME = "bearer "
PREFIX = "hk_"
# Seconds between a server's checks whether the file has changed.
LOOK_S = 1.0
DURATION = re.compile(r"(\d{1,6})([dh])")


class APIKey(BaseModel):
    """One client's key. A key is long and random, so one round of SHA-256 protects it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    models: list[str] | None = Field(
        None, min_length=1, description="Models that the client may use; default: all."
    )
    rate: float | None = Field(
        None, gt=0, description="Most requests per second to each replica; default: no limit."
    )
    expires: datetime | None = Field(None, description="When the key expires; default: never.")
    admin: bool = Field(False, description="Let the client load and unload models.")

    @model_validator(mode="before")
    @classmethod
    def _no_empty_limits(cls, value: Any) -> Any:
        """Reject fields without a value: each would silently remove a limit."""
        if isinstance(value, dict):
            for name, given in value.items():
                # Pydantic would read a number as seconds since 1970.
                if given is None or (name == "expires" and not isinstance(given, str | date)):
                    raise ValueError(f"'{name}' has no valid value")
        return value

    @field_validator("expires")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value

    def sees(self, model: str) -> bool:
        """Return whether the key is valid for a model."""
        return self.models is None or model in self.models


class TokenBucket:
    """A token bucket that holds the tokens of one second, and at least one."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._tokens = max(rate, 1.0)
        self._at: float | None = None

    def take(self, now: float) -> float:
        """Take a token; return 0, or how many seconds to wait for one."""
        if self._at is not None:
            filled = self._tokens + (now - self._at) * self.rate
            self._tokens = min(max(self.rate, 1.0), filled)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0


class KeyStore:
    """The keys of a file, read again when it changes. Belongs to one thread."""

    def __init__(self, keys: Sequence[APIKey], path: Path | None = None) -> None:
        """Set the keys. path: the file that contains them, which is watched; None for no file."""
        self._path = path
        self._seen = _version(path)
        self._looked_at = -LOOK_S
        self._buckets: dict[str, TokenBucket] = {}
        self._adopt(keys)

    @classmethod
    def load(cls, path: str) -> Self:
        """Read the keys in a file. Raises UserError if the file is missing or malformed."""
        return cls(_read(Path(path)), Path(path))

    def check(self, authorization: str | None, now: float) -> APIKey:
        """Return the key in an Authorization header.

        now: seconds of a monotonic clock. Raises Unauthorized if there is no valid key, RateLimited
        if the key exceeds its rate.
        """
        self._look(now)
        if authorization is None or not authorization.lower().startswith(SCHEME):
            raise Unauthorized("a key is required: send the header 'Authorization: Bearer KEY'.")
        # Clients cannot choose the digest, so the time of the lookup reveals nothing of other keys.
        found = self._keys.get(_digest(authorization[len(SCHEME) :].strip()))
        if found is None:
            raise Unauthorized("the key is invalid.")
        if found.expires is not None and found.expires.timestamp() <= time.time():
            raise Unauthorized(f"key '{found.name}' has expired.")
        if bucket := self._buckets.get(found.sha256):
            wait_s = bucket.take(now)
            if wait_s:
                raise RateLimited(
                    f"key '{found.name}' is limited to {found.rate:g} requests per second.", wait_s
                )
        return found

    def _adopt(self, keys: Sequence[APIKey]) -> None:
        before = self._buckets
        self._keys = {key.sha256: key for key in keys}
        self._buckets = {}
        for key in keys:
            if key.rate is not None:
                known = before.get(key.sha256)
                same = known is not None and known.rate == key.rate
                self._buckets[key.sha256] = known if known and same else TokenBucket(key.rate)

    def _look(self, now: float) -> None:
        """Read the file again if it has changed. If it is deleted, no key is valid.

        If the file is malformed, the old keys stay valid, because it may be half-written.
        """
        if self._path is None or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        version = _version(self._path)
        if version == self._seen:
            return
        self._seen = version
        if version is None:
            logger.error("keys file '%s' is missing: no key is valid until it exists", self._path)
            self._adopt([])
            return
        try:
            self._adopt(_read(self._path))
            logger.warning("keys file '%s' has changed: %d keys", self._path, len(self._keys))
        except UserError as error:
            logger.error("%s The previous keys stay valid.", error)


def _version(path: Path | None) -> tuple[int, int, int] | None:
    """Return values that change with a file's content; None if there is no file."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _read(path: Path) -> list[APIKey]:
    try:
        entries = yaml.safe_load(path.read_text()) or []
        return [APIKey.model_validate(entry) for entry in entries]
    except OSError as error:
        raise UserError(f"keys file '{path}' cannot be read ({error.strerror}).") from error
    except (ValidationError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"keys file '{path}' is not a list of keys; create one with: "
            "python -m serve.security NAME"
        ) from error


def _write(path: Path, keys: list[APIKey]) -> None:
    entries = [key.model_dump(exclude_none=True) for key in keys]
    commit.write_atomic(str(path), yaml.safe_dump(entries, sort_keys=False).encode(), 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file for one command at a time. Raises UserError if its folder cannot be opened."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"'{path.parent}' cannot be opened ({error.strerror}).") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _until(words: str) -> datetime:
    """Return when a key expires: 90d or 12h from now, or a date or time in ISO 8601 (UTC)."""
    if match := DURATION.fullmatch(words):
        unit = timedelta(days=1) if match[2] == "d" else timedelta(hours=1)
        return (datetime.now(UTC) + int(match[1]) * unit).replace(microsecond=0)
    try:
        found = datetime.fromisoformat(words)
    except ValueError:
        raise ValueError(f"'{words}' is not a time; expected 90d, 12h or 2027-01-31") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class KeyOptions(CommandOptions):
    """Create a client's key, which is printed once, or revoke it."""

    model_config = SettingsConfigDict(cli_prog_name="python -m serve.security")

    name: CliPositionalArg[str] = Field(description="Name of the client.")
    file: Path = Field(Path("keys.yaml"), description="File with the hashes of all keys.")
    models: str | None = Field(
        None, description="Models that the client may use, such as digits,taxis; default: all."
    )
    rate: float | None = Field(
        None, description="Most requests per second to each replica; default: no limit."
    )
    expires: Annotated[datetime, BeforeValidator(_until)] | None = Field(
        None, description="When the key expires: 90d, 12h or 2027-01-31; default: never."
    )
    admin: bool = Field(False, description="Let the client load and unload models.")
    revoke: bool = Field(False, description="Remove the key from the file.")


def _new_key(given: KeyOptions, secret: str) -> APIKey:
    """Return the entry for a new key. Raises UserError if an option is invalid."""
    models = None if given.models is None else [each for each in given.models.split(",") if each]
    limits = {"models": models, "rate": given.rate, "expires": given.expires}
    try:
        return APIKey(
            name=given.name,
            sha256=_digest(secret),
            **{name: value for name, value in limits.items() if value is not None},
            admin=given.admin,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg'].lower()}.") from error


def main(argv: Sequence[str]) -> None:
    """Add or revoke a key. Raises UserError if the key exists, or does not exist."""
    given = parse_options(KeyOptions, argv)
    with _locked(given.file):
        keys = _read(given.file) if given.file.exists() else []
        others = [key for key in keys if key.name != given.name]
        if given.revoke:
            if len(others) == len(keys):
                raise UserError(f"'{given.file}' has no key '{given.name}'.")
            _write(given.file, others)
            print(f"revoked '{given.name}' in {given.file}.", file=sys.stderr)
            return
        if len(others) < len(keys):
            raise UserError(
                f"'{given.file}' already has a key '{given.name}'. Use another name or --revoke."
            )
        secret = PREFIX + secrets.token_urlsafe(32)
        _write(given.file, [*keys, _new_key(given, secret)])
    print(f"added '{given.name}' to {given.file}; the key is only shown once:", file=sys.stderr)
    print(secret)


if __name__ == "__main__":
    run_command(main)
