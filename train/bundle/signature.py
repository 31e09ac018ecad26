"""Signatures of bundles. They prove who made a bundle, which its digests alone do not.

A signature is a file of the bundle in the format of OpenSSF model-signing that covers all other
files. Bundles are signed with a private key when they are written, and verified with the public key
when they are loaded. Both keys are PEM files of an elliptic curve (P-256, P-384 or P-521). A
process that must load only signed bundles calls `require` once.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.private import SIGNING_KEY

SIGNATURE = "model.sig"
INSTALL = "pip install 'halyard[signing]'"

# Parts of the error messages of model-signing, which contain a list with some escaped quotes.
CHANGED = "Signature mismatch"
CHANGED_FILES = re.compile(
    r"Hash mismatch for \\?'([^'\\]+)|(?:Extra|Missing) files[^:]+: ([^'\"]+)"
)

_trusted: tuple[str, ...] = ()


class NotTrusted(ValueError):
    """A bundle has no valid signature by one of the required keys."""


def require(public_keys: Iterable[str]) -> None:
    """Let this process load only bundles that one of these keys has signed.

    public_keys: paths of PEM files; if empty, bundles need no signature. Raises UserError if a key
    cannot be used.
    """
    global _trusted
    keys = tuple(public_keys)
    for key in keys:
        _verifier(key)
    _trusted = keys


def check(folder: Path) -> None:
    """Verify a bundle's signature, if this process requires one.

    Raises NotTrusted unless one of the required keys has signed the files in their present state.
    """
    if not _trusted:
        return
    file = folder / SIGNATURE
    if not file.is_file():
        raise NotTrusted(f"'{folder}' is not signed; {_required()}")
    for link in (each for each in folder.rglob("*") if each.is_symlink()):
        raise NotTrusted(f"'{link}' is a symbolic link, whose target is not signed")
    for key in _trusted:
        try:
            _verifier(key).set_hashing_config(_hashing(folder)).verify(folder, file)
            return
        except OSError as error:
            raise NotTrusted(f"'{folder}' cannot be verified: {error}") from error
        except Exception as error:  # an untrusted file may cause any error in a parser
            if str(error).startswith(CHANGED):
                found = [one or other for one, other in CHANGED_FILES.findall(str(error))]
                what = ", ".join(found) or "a file"
                raise NotTrusted(f"'{folder}' was changed after it was signed: {what}") from error
    raise NotTrusted(
        f"'{folder}' is signed by another key, or its signature is damaged; {_required()}"
    )


def _required() -> str:
    return f"a signature by {' or '.join(_trusted)} is required"


def sign(folder: Path, private_key: str | None = None) -> None:
    """Sign a bundle if there is a key, and replace an earlier signature.

    private_key: path of a PEM file. By default the environment variable HALYARD_SIGNING_KEY, which
    has a path or, as secrets do, the key itself. Raises UserError if the key cannot be used.
    """
    with _signer(private_key) as signer:
        if signer is not None:
            (folder / SIGNATURE).unlink(missing_ok=True)
            signer.set_hashing_config(_hashing(folder)).sign(folder, folder / SIGNATURE)


def has_key(private_key: str | None = None) -> bool:
    """Return whether `sign` would sign. Raises UserError if the key cannot be used."""
    with _signer(private_key) as signer:
        return signer is not None


def _hashing(folder: Path) -> Any:
    """Return the configuration of what is signed: all files except the signature."""
    return _import("hashing").Config().set_ignored_paths(paths=[folder / SIGNATURE])


def _verifier(public_key: str) -> Any:
    """Return the verifier of a key. Raises UserError if the key cannot be used."""
    verifying = _import("verifying")
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except Exception as error:
        raise _unusable(public_key, "public", error) from error


@contextmanager
def _signer(private_key: str | None) -> Iterator[Any]:
    """Yield the signer, or None without a key. Raises UserError if the key cannot be used."""
    named = private_key or os.environ.get(SIGNING_KEY)
    if not named:
        yield None
        return
    with ExitStack() as stack:
        if named.startswith("-----BEGIN"):
            file = stack.enter_context(tempfile.NamedTemporaryFile("w"))
            file.write(named)
            file.flush()
            path, shown = Path(file.name), SIGNING_KEY
        else:
            path, shown = Path(named), named
        try:
            signer = _import("signing").Config().use_elliptic_key_signer(private_key=path)
        except UserError:
            raise
        except Exception as error:  # cryptography raises several types
            raise _unusable(shown, "private", error) from error
        yield signer


def _unusable(path: str, kind: str, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:100]
    return UserError(
        f"'{path}' cannot be used to {'sign' if kind == 'private' else 'verify'} bundles "
        f"({reason}); expected a {kind} key of an elliptic curve in PEM format, without password."
    )


def _import(name: str) -> Any:
    """Return a module of model-signing. Raises UserError if the package is not installed."""
    try:
        import model_signing
    except ImportError as error:
        raise UserError(f"signed bundles need the package model-signing: {INSTALL}.") from error
    return getattr(model_signing, name)
