"""Signatures of bundles: who made one, which its own digests do not show.

A signature is a file of the bundle in the format of OpenSSF model-signing, over all the others. The
private key signs a bundle when it is written; whoever loads it has the public key. Both are PEM
files of an elliptic curve (P-256, P-384 or P-521). A process that is to load only signed bundles
calls `require` once.
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

# In the words of model-signing, which shows a list, with quotes escaped here and there.
CHANGED = "Signature mismatch"
CHANGED_FILES = re.compile(
    r"Hash mismatch for \\?'([^'\\]+)|(?:Extra|Missing) files[^:]+: ([^'\"]+)"
)

_trusted: tuple[str, ...] = ()


class NotTrusted(ValueError):
    """A bundle without a signature by one of the keys that are required."""


def require(public_keys: Iterable[str]) -> None:
    """Let this process load only bundles that one of these keys has signed; any for none.

    public_keys: paths of PEM files. Raises UserError where one cannot be used.
    """
    global _trusted
    keys = tuple(public_keys)
    for key in keys:
        _verifier(key)
    _trusted = keys


def check(folder: Path) -> None:
    """Raises NotTrusted unless a required key has signed the files of a bundle as they are."""
    if not _trusted:
        return
    file = folder / SIGNATURE
    if not file.is_file():
        raise NotTrusted(f"'{folder}' is not signed; {_required()}")
    for link in (each for each in folder.rglob("*") if each.is_symlink()):
        raise NotTrusted(f"'{link}' is a link, whose target is not signed")
    for key in _trusted:
        try:
            _verifier(key).set_hashing_config(_hashing(folder)).verify(folder, file)
            return
        except OSError as error:
            raise NotTrusted(f"'{folder}' cannot be verified: {error}") from error
        except Exception as error:  # what a file from anywhere makes of a parser
            if str(error).startswith(CHANGED):
                found = [one or other for one, other in CHANGED_FILES.findall(str(error))]
                what = ", ".join(found) or "a file"
                raise NotTrusted(f"'{folder}' was changed after it was signed: {what}") from error
    raise NotTrusted(
        f"'{folder}' is signed by another key, or its signature is damaged; {_required()}"
    )


def _required() -> str:
    return f"required is a signature by {' or '.join(_trusted)}"


def sign(folder: Path, private_key: str | None = None) -> None:
    """Sign a bundle in place of any earlier signature, if there is a key.

    private_key: path of a PEM file; by default what HALYARD_SIGNING_KEY holds, a path or the key
    itself, as a secret has it. Raises UserError where it cannot be used.
    """
    with _signer(private_key) as signer:
        if signer is not None:
            (folder / SIGNATURE).unlink(missing_ok=True)
            signer.set_hashing_config(_hashing(folder)).sign(folder, folder / SIGNATURE)


def has_key(private_key: str | None = None) -> bool:
    """Whether `sign` would sign. Raises UserError where the key cannot be used."""
    with _signer(private_key) as signer:
        return signer is not None


def _hashing(folder: Path) -> Any:
    """What is signed: all files but the signature."""
    return _import("hashing").Config().set_ignored_paths(paths=[folder / SIGNATURE])


def _verifier(public_key: str) -> Any:
    """Raises UserError."""
    verifying = _import("verifying")
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except Exception as error:
        raise _unusable(public_key, "public", error) from error


@contextmanager
def _signer(private_key: str | None) -> Iterator[Any]:
    """None without a key. Raises UserError."""
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
        except Exception as error:  # cryptography has several kinds
            raise _unusable(shown, "private", error) from error
        yield signer


def _unusable(path: str, kind: str, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:100]
    return UserError(
        f"'{path}' cannot be used to {'sign' if kind == 'private' else 'verify'} bundles "
        f"({reason}); expected a {kind} key of an elliptic curve, without password, in PEM format."
    )


def _import(name: str) -> Any:
    """Raises UserError."""
    try:
        import model_signing
    except ImportError as error:
        raise UserError(f"signed bundles need model-signing; {INSTALL}.") from error
    return getattr(model_signing, name)
