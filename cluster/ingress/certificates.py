"""The certificates with which HAProxy speaks TLS, and their renewal while it runs.

HAProxy reads copies in its own folder: a certificate and its key in one file, as it expects them.
When a file of the user's changes, a process beside HAProxy checks the new contents and hands them
to HAProxy by its administration socket. Connections stay open; new ones get the new certificate.
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

# How often the files are looked at, and how long HAProxy may take to answer.
POLL_S, ANSWER_S = 1.0, 10.0
SUCCESS = "Success!"

# What Ray reads, after RAY_TLS_.
NODE_FILES = ("SERVER_CERT", "SERVER_KEY", "CA_CERT")

# HAProxy's copies.
SERVER, CLIENTS = "server.pem", "clients.pem"
NODE, NODES = "node.pem", "nodes.pem"

# Modification time, inode and size of each file; None for a missing one.
Fingerprint = list[tuple[int, int, int] | None]


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files: a certificate with its chain, its key, and optionally the authorities
    whose certificates clients must present.
    """

    cert: str
    key: str
    client_ca: str | None = None

    def environment(self) -> dict[str, str]:
        """Return the variables that name these files for HAProxy, as absolute paths."""
        paths = zip(VARIABLES, (self.cert, self.key, self.client_ca), strict=True)
        return {name: str(Path(path).resolve()) for name, path in paths if path}

    def read(self) -> dict[str, str]:
        """Return what HAProxy is to have, by file name, once it has been checked.

        Raises ValueError where a file cannot be read or is not in PEM format, the key is encrypted,
        or it does not belong to the certificate.
        """
        import ssl  # HAProxy starts for each change of the replicas, mostly without TLS

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert, key = _text(self.cert), _text(self.key)
        if "ENCRYPTED" in key:  # else OpenSSL asks for the password on the terminal
            raise ValueError(f"the key in '{self.key}' is encrypted; expected one without password")
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
        """Return what differs once a file has been changed or replaced."""
        return [_state(path) for path in (self.cert, self.key, self.client_ca) if path]

    def bind_options(self, folder: Path, protocols: str) -> str:
        """Return what a `bind` line of HAProxy ends with.

        protocols: the names that clients may choose from, such as h2,http/1.1.
        """
        options = f" ssl crt {folder / SERVER} alpn {protocols} ssl-min-ver TLSv1.2"
        if self.client_ca:
            options += f" ca-file {folder / CLIENTS} verify required"
        return options


def nodes_speak_tls() -> bool:
    """Whether Ray's nodes speak TLS with each other."""
    return os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")


def replica_options(folder: Path, protocol: str) -> str:
    """Return what a `server` line of HAProxy ends with for a replica, "" where nodes speak no TLS.

    protocol: h2 or http/1.1. Writes HAProxy's copies of this node's certificate. Raises ValueError.
    """
    if not nodes_speak_tls():
        return ""
    cert, key, authority = (_text(os.environ.get(f"RAY_TLS_{name}", "")) for name in NODE_FILES)
    _write({NODE: f"{cert}\n{key}", NODES: authority}, folder)
    options = f" ssl crt {folder / NODE} ca-file {folder / NODES} verify required"
    return f"{options} alpn {protocol} check-alpn {protocol}"


def from_environment() -> Certificates | None:
    """Return what the environment names, None if it names nothing. Raises ValueError."""
    cert, key, client_ca = (os.environ.get(name) for name in VARIABLES)
    if not cert and not key and not client_ca:
        return None
    if not cert or not key:
        raise ValueError(f"{CERT} and {KEY} go together")
    return Certificates(cert, key, client_ca or None)


def prepare(certificates: Certificates, folder: Path, *, is_reload: bool) -> Fingerprint:
    """Write HAProxy's copies before it starts; return the fingerprint of what was read.

    is_reload: whether a HAProxy of the same server runs, so that its copies are of use where the
    files are just being changed. Raises ValueError where they are not valid otherwise.
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
    print(f"the former certificates stay in use: {error}", file=sys.stderr, flush=True)


def _write(contents: dict[str, str], folder: Path) -> None:
    """Write files that this user alone may read, each replaced as a whole."""
    for name, text in contents.items():
        aside = folder / f".{name}.{os.getpid()}"
        with open(aside, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
        aside.replace(folder / name)


def renew_in_background(
    certificates: Certificates, folder: Path, admin_socket: Path, known: Fingerprint
) -> None:
    """Start a process that renews the certificates of what this process becomes, and ends with it.

    For a process that is about to be replaced by HAProxy. known: see `renew`.
    """
    haproxy = os.getpid()
    # A grandchild, which HAProxy need not wait for.
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
    """Hand changed certificates to a HAProxy until it ends or another has taken its socket.

    haproxy: its process id. known: the fingerprint of what it has. Contents that are not a
    certificate and its key are reported on stderr and leave the former ones in use.
    """
    import psutil

    failed, process = None, psutil.Process(haproxy)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(POLL_S)
        # Before the files are read: what changes meanwhile is seen the next time.
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
        except (OSError, ValueError) as error:  # tried again, said once
            if found != failed:
                _warn(error)
            failed = found
            continue
        print("HAProxy has the changed certificates", file=sys.stderr, flush=True)
        known = found


def _replace(admin_socket: Path, file: Path, text: str) -> None:
    """Give a running HAProxy the contents of a file that it has read. Raises OSError."""
    kind = "cert" if file.name == SERVER else "ca-file"
    ask(admin_socket, f"set ssl {kind} {file} <<\n{text}")
    answer = ask(admin_socket, f"commit ssl {kind} {file}")
    if SUCCESS not in answer:
        with suppress(OSError):
            ask(admin_socket, f"abort ssl {kind} {file}")
        raise OSError(f"HAProxy refused '{file}': {' '.join(answer.split())}")


def ask(admin_socket: Path, command: str) -> str:
    """Return HAProxy's answer to a command. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(str(admin_socket))
        connection.sendall(f"{command}\n".encode())
        with connection.makefile() as answer:
            return answer.read()


def _text(path: str) -> str:
    """Raises ValueError."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from error


def _without_blank_lines(text: str) -> str:
    """A blank line ends what HAProxy takes by its socket."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip())


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
