"""HAProxy's TLS certificates, and their renewal while HAProxy runs.

HAProxy reads copies in its own folder, with a certificate and its key in one file, as it requires.
When one of the user's files changes, a separate process checks the new contents and sends them to
HAProxy's administration socket. Open connections continue; new ones get the new certificate.
"""

import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CERT, KEY, CLIENT_CA = "HALYARD_TLS_CERT", "HALYARD_TLS_KEY", "HALYARD_TLS_CLIENT_CA"
VARIABLES = (CERT, KEY, CLIENT_CA)

# Seconds between two checks of the files, and seconds that HAProxy has to respond.
POLL_S, ANSWER_S = 1.0, 10.0
SUCCESS = "Success!"

# Ray's variables for the files of its nodes, without their prefix RAY_TLS_.
NODE_FILES = ("SERVER_CERT", "SERVER_KEY", "CA_CERT")

# The names of HAProxy's copies.
SERVER, CLIENTS = "server.pem", "clients.pem"
NODE, NODES = "node.pem", "nodes.pem"

# Modification time, inode and size of each file; None for a missing one.
Fingerprint = list[tuple[int, int, int] | None]


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files: a certificate with its chain, and its key.

    client_ca: authorities, one of which must have issued the certificate of each client; None if
    clients need no certificate.
    """

    cert: str
    key: str
    client_ca: str | None = None

    def environment(self) -> dict[str, str]:
        """Return the environment variables that name these files, with absolute paths."""
        paths = zip(VARIABLES, (self.cert, self.key, self.client_ca), strict=True)
        return {name: str(Path(path).resolve()) for name, path in paths if path}

    def read(self) -> dict[str, str]:
        """Check the files; return the contents of HAProxy's copies by file name.

        Raises ValueError if a file cannot be read or is not in PEM format, or if the key is
        encrypted or does not belong to the certificate.
        """
        import ssl  # here, as HAProxy restarts when replicas change, and mostly without TLS

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert, key = _text(self.cert), _text(self.key)
        if "ENCRYPTED" in key:  # OpenSSL would prompt for the password on the terminal
            raise ValueError(
                f"the key in '{self.key}' is encrypted; expected a key without a password"
            )
        try:
            context.load_cert_chain(self.cert, self.key)
        except ssl.SSLError as error:
            reason = str(error.reason or error)
            if reason == "KEY_VALUES_MISMATCH":
                words = f"the key in '{self.key}' does not belong to the certificate"
                raise ValueError(f"{words} in '{self.cert}'") from error
            words = f"'{self.cert}' and '{self.key}' are not a certificate and its key in PEM"
            raise ValueError(f"{words} format ({reason})") from error
        read = {SERVER: _without_blank_lines(f"{cert}\n{key}")}
        if self.client_ca:
            authorities = _text(self.client_ca)
            try:
                context.load_verify_locations(cadata=authorities)
            except ssl.SSLError as error:
                words = f"'{self.client_ca}' has no certificates in PEM format"
                raise ValueError(f"{words} ({error.reason})") from error
            read[CLIENTS] = _without_blank_lines(authorities)
        return read

    def fingerprint(self) -> Fingerprint:
        """Return a value that changes when one of the files is changed or replaced."""
        return [_state(path) for path in (self.cert, self.key, self.client_ca) if path]

    def bind_options(self, folder: Path, protocols: str) -> str:
        """Return the TLS options for a `bind` line of HAProxy.

        protocols: the ALPN names that clients may choose from, such as h2,http/1.1.
        """
        options = f" ssl crt {folder / SERVER} alpn {protocols} ssl-min-ver TLSv1.2"
        if self.client_ca:
            options += f" ca-file {folder / CLIENTS} verify required"
        return options


def nodes_speak_tls() -> bool:
    """Return whether Ray's nodes use TLS between each other."""
    return os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")


def replica_options(folder: Path, protocol: str) -> str:
    """Return the TLS options for a replica's `server` line, "" if the nodes do not use TLS.

    protocol: h2 or http/1.1. Also writes HAProxy's copies of this node's certificate. Raises
    ValueError if a file of this node cannot be read.
    """
    if not nodes_speak_tls():
        return ""
    cert, key, authority = (_text(os.environ.get(f"RAY_TLS_{name}", "")) for name in NODE_FILES)
    _write({NODE: f"{cert}\n{key}", NODES: authority}, folder)
    options = f" ssl crt {folder / NODE} ca-file {folder / NODES} verify required"
    return f"{options} alpn {protocol} check-alpn {protocol}"


def from_environment() -> Certificates | None:
    """Return the certificates that the environment names, None if it names none.

    Raises ValueError if the certificate or its key is missing.
    """
    cert, key, client_ca = (os.environ.get(name) for name in VARIABLES)
    if not cert and not key and not client_ca:
        return None
    if not cert or not key:
        raise ValueError(f"{CERT} and {KEY} must be set together")
    return Certificates(cert, key, client_ca or None)


def prepare(certificates: Certificates, folder: Path, *, is_reload: bool) -> Fingerprint:
    """Write HAProxy's copies before it starts; return the fingerprint of the files.

    is_reload: whether a HAProxy of this server is running. Its copies are then used if the files
    are invalid, as they may be half-written. Raises ValueError if they are invalid otherwise.
    """
    found = certificates.fingerprint()
    try:
        _write(certificates.read(), folder)
    except ValueError as error:
        if not is_reload or not (folder / SERVER).exists():
            raise
        _warn(error)
    return found


def _warn(error: Exception) -> None:
    print(f"the previous certificates stay in use: {error}", file=sys.stderr, flush=True)


def _write(contents: dict[str, str], folder: Path) -> None:
    """Write files that only this user can read, and replace each of them atomically."""
    for name, text in contents.items():
        aside = folder / f".{name}.{os.getpid()}"
        with open(aside, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
        aside.replace(folder / name)


def renew_in_background(
    certificates: Certificates, folder: Path, admin_socket: Path, known: Fingerprint
) -> None:
    """Start a process that renews HAProxy's certificates and ends together with HAProxy.

    Call it in a process that is about to become HAProxy by exec. known: see `renew`.
    """
    haproxy = os.getpid()
    # Fork twice: HAProxy, which this process becomes, does not wait for children.
    if child := os.fork():
        os.waitpid(child, 0)
        return
    try:
        if os.fork() == 0:
            os.setsid()
            renew(certificates, folder, admin_socket, haproxy, known)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def renew(
    certificates: Certificates,
    folder: Path,
    admin_socket: Path,
    haproxy: int,
    known: Fingerprint,
) -> None:
    """Send changed certificates to HAProxy until it ends or another HAProxy has its socket.

    haproxy: its process id. known: the fingerprint of the files that it has loaded. Invalid files
    are reported on stderr, and the previous certificates stay in use.
    """
    import psutil

    failed, process = None, psutil.Process(haproxy)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(POLL_S)
        # Taken before the files are read, so that a change in between is noticed the next time.
        found = certificates.fingerprint()
        if found == known:
            continue
        try:
            if f"Pid: {haproxy}\n" not in ask(admin_socket, "show info"):
                return
            contents = certificates.read()
            _write(contents, folder)
            for name, text in contents.items():
                _replace(admin_socket, folder / name, text)
        except (OSError, ValueError) as error:  # tried again, but reported once
            if found != failed:
                _warn(error)
            failed = found
            continue
        print("HAProxy has loaded the changed certificates", file=sys.stderr, flush=True)
        known = found


def _replace(admin_socket: Path, file: Path, text: str) -> None:
    """Replace the contents of a file that HAProxy has loaded. Raises OSError if that fails."""
    kind = "cert" if file.name == SERVER else "ca-file"
    ask(admin_socket, f"set ssl {kind} {file} <<\n{text}")
    answer = ask(admin_socket, f"commit ssl {kind} {file}")
    if SUCCESS not in answer:
        with suppress(OSError):
            ask(admin_socket, f"abort ssl {kind} {file}")
        raise OSError(f"HAProxy rejected '{file}': {' '.join(answer.split())}")


def ask(admin_socket: Path, command: str) -> str:
    """Send HAProxy a command; return its response. Raises OSError if HAProxy does not respond."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(str(admin_socket))
        connection.sendall(f"{command}\n".encode())
        with connection.makefile() as answer:
            return answer.read()


def _text(path: str) -> str:
    """Return the content of a PEM file. Raises ValueError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from error


def _without_blank_lines(text: str) -> str:
    """Remove blank lines, because a blank line ends a payload on HAProxy's socket."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip())


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
