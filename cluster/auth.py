"""The token that protects Ray's ports.

Whoever reaches a port of Ray can run code there, so Ray starts in its token mode: every connection
presents a secret that all processes of a cluster share. Ray looks for it in RAY_AUTH_TOKEN, in the
file that RAY_AUTH_TOKEN_PATH names, and in ~/.ray/auth_token, in this order.
"""

import hashlib
import hmac
import os
import secrets
import sys
from pathlib import Path

from cluster.errors import UserError

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def enabled() -> bool:
    return os.environ.get(MODE, "token").lower() == "token"


def default_path() -> Path:
    """Where Ray looks for the token when no variable says otherwise."""
    return Path.home() / ".ray" / "auth_token"


def ensure_token() -> None:
    """Make the token on first use, readable by this user alone.

    Raises UserError where the token cannot be read, is empty, or cannot be written.
    """
    if not enabled() or os.environ.get(TOKEN):
        return
    named = os.environ.get(PATH)
    path = Path(named) if named else default_path()
    try:
        if not named:
            _create(path)
            _restrict(path)
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the token of Ray cannot be read from '{path}' ({_reason(error)}); "
            f"name a file that holds it in {PATH}."
        ) from error
    if not token:
        raise UserError(f"'{path}' is empty; expected the token of Ray. {_remedy(named)}")


def token() -> str | None:
    """Return the token, or None where the mode is another or there is no token."""
    if not enabled():
        return None
    if given := os.environ.get(TOKEN):
        return given
    try:
        return Path(os.environ.get(PATH) or default_path()).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def derive_secret(purpose: str) -> str:
    """Return a secret that whoever has the token can compute, and which does not tell the token.

    Empty where there is no token.
    """
    if not (shared := token()):
        return ""
    return hmac.new(shared.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def token_source() -> str:
    """Where the token is, for a user to read."""
    if os.environ.get(TOKEN):
        return f"in {TOKEN}"
    return str(os.environ.get(PATH) or default_path())


def _create(path: Path) -> None:
    """Write a new token unless there is one. Several processes may do so at once: one wins."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with open(aside, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, this fails where another process has been quicker.
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)


def _restrict(path: Path) -> None:
    """Take the file from the other users of this machine; Ray itself writes it readable by all."""
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
        print(
            f"'{path}' could be read by other users, and no longer can. Where they are not "
            "trusted, delete it: a new token is made at the next start.",
            file=sys.stderr,
        )


def _remedy(named: str | None) -> str:
    return "Copy it from the head of the cluster." if named else "Delete it: a new one is made."


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not text"
