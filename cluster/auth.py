"""The token that protects Ray's ports.

Anyone who can reach one of Ray's ports can run code there. Ray is therefore started in token mode,
in which every connection presents a secret that all processes of a cluster share. Ray looks for the
secret in RAY_AUTH_TOKEN, then in the file that RAY_AUTH_TOKEN_PATH names, then in
~/.ray/auth_token.
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
    """Return whether Ray runs in token mode, which is the default."""
    return os.environ.get(MODE, "token").lower() == "token"


def default_path() -> Path:
    """Return the file that Ray reads the token from if no variable is set."""
    return Path.home() / ".ray" / "auth_token"


def ensure_token() -> None:
    """Create the token on first use, readable by this user only.

    Raises UserError if the token cannot be read or written, or if its file is empty.
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
            f"Ray's token cannot be read from '{path}' ({_reason(error)}); "
            f"set {PATH} to a file that holds it."
        ) from error
    if not token:
        raise UserError(f"'{path}' is empty; expected Ray's token. {_remedy(named)}")


def token() -> str | None:
    """Return the token, or None if Ray is not in token mode or there is no token yet."""
    if not enabled():
        return None
    if given := os.environ.get(TOKEN):
        return given
    try:
        return Path(os.environ.get(PATH) or default_path()).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def derive_secret(purpose: str) -> str:
    """Return a secret, in hex, that is derived from the token and does not reveal it.

    Returns "" if there is no token.
    """
    if not (shared := token()):
        return ""
    return hmac.new(shared.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def token_source() -> str:
    """Return the place of the token as text for the user."""
    if os.environ.get(TOKEN):
        return f"in {TOKEN}"
    return str(os.environ.get(PATH) or default_path())


def _create(path: Path) -> None:
    """Write a new token unless the file exists. If several processes do so at once, one wins."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with open(aside, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, this fails if another process created the file first.
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)


def _restrict(path: Path) -> None:
    """Let only this user read the file; Ray itself creates it readable by all users."""
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
        print(
            f"'{path}' could be read by other users; its permissions are now 0600. If you do not "
            "trust these users, delete the file: a new token is created at the next start.",
            file=sys.stderr,
        )


def _remedy(named: str | None) -> str:
    if named:
        return "Copy the token from the head of the cluster."
    return "Delete the file: a new token is created."


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not text"
