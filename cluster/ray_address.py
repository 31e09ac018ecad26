"""The address of the Ray that runs on this machine, and whether a Ray responds at an address."""

import os
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path

from cluster import auth, ray_internals
from cluster.errors import UserError

# Seconds. A running cluster responds much faster, even on a busy machine.
ANSWER_S = 4.0
# The state of a listening socket in /proc/net/tcp.
LISTENING = "0A"


def forget_ended() -> str | None:
    """Return the address, from Ray's address file, of the Ray that runs on this machine, if any.

    If that Ray has ended, which Ray itself would notice only after minutes, the file is removed and
    a message is printed on stderr. Raises UserError if that Ray requires another token.
    """
    address = _noted_address()
    if address is None or answers(address):
        return address
    file = ray_internals.address_file()
    print(f"Ray at {address} has ended; removing its address file {file}.", file=sys.stderr)
    with suppress(OSError):
        file.unlink()
    return None


def _noted_address() -> str | None:
    """Return the address of the Ray last started on this machine by this user or by root.

    Files of other users are ignored: everyone can write there, and a cluster that this process
    joins can run code in it.
    """
    try:
        # Opening a named pipe would block without O_NONBLOCK.
        file = os.open(ray_internals.address_file(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file) as notes:
            found = os.fstat(file)
            is_ours = stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.getuid())
            return (notes.read().strip() or None) if is_ours else None
    except OSError:
        return None


def answers(address: str) -> bool:
    """Return whether Ray responds at HOST:PORT; True for addresses of any other form.

    Ray itself would retry for minutes. Raises UserError if the cluster requires another token.
    """
    import grpc

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        return True
    if _is_of_another_user(host, int(port)):
        return False
    auth.ensure_token()
    ray_internals.reload_environment()
    with ray_internals.gcs_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(wrong_token(address)) from None
            return False  # no program listens there, or it is not Ray
    return True


def _is_of_another_user(host: str, port: int) -> bool:
    """Return whether a user other than this one and root listens on a port of this machine.

    After a Ray has died, any user could listen on its port and would receive the token.
    """
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError:
        return False  # the address is another machine's, or invalid
    users = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                    users.add(int(uid))
    return not users <= {0, os.getuid()}


def wrong_token(address: str) -> str:
    """Return the message for a cluster that requires another token."""
    return (
        f"the cluster at {address} requires another token. Set {auth.MODE}=token, and set "
        f"{auth.PATH} to a file with the cluster's token if it is not in ~/.ray/auth_token."
    )
