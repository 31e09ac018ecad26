"""The address of the Ray that runs on this machine, by Ray's own note, and whether it answers."""

import os
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path

from cluster import auth, ray_internals
from cluster.errors import UserError

# A cluster that is up answers in far less, also on a busy machine.
ANSWER_S = 4.0
# State of a socket in the kernel's tables of connections.
LISTENING = "0A"


def forget_ended() -> str | None:
    """Return the address of the Ray that runs on this machine by Ray's own notes, if any.

    Where it has ended, which Ray finds out in minutes only, the note is removed, and stderr says
    so. Raises UserError where it asks for another token.
    """
    address = _noted_address()
    if address is None or answers(address):
        return address
    file = ray_internals.address_file()
    print(f"Ray has ended at {address}, which {file} still named.", file=sys.stderr)
    with suppress(OSError):
        file.unlink()
    return None


def _noted_address() -> str | None:
    """The address of the Ray that was started last on this machine, by this user or by root.

    Every user may write there, and whom this process joins may run code in it.
    """
    try:
        # A pipe would be waited for.
        file = os.open(ray_internals.address_file(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file) as notes:
            found = os.fstat(file)
            is_ours = stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.getuid())
            return (notes.read().strip() or None) if is_ours else None
    except OSError:
        return None


def answers(address: str) -> bool:
    """Whether Ray answers at HOST:PORT; other forms of address are taken to answer.

    Ray itself tries for minutes. Raises UserError where it asks for another token.
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
            return False  # nothing is there, or another program
    return True


def _is_of_another_user(host: str, port: int) -> bool:
    """Whether an address of this machine is listened on by another user than this one and root.

    Where a Ray has died anybody may take its port, and would be sent the token.
    """
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError:
        return False  # of another machine, or no address
    users = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                    users.add(int(uid))
    return not users <= {0, os.getuid()}


def wrong_token(address: str) -> str:
    return (
        f"the cluster at {address} asks for another token. Set {auth.MODE}=token, and {auth.PATH} "
        "to a file with the cluster's token where that is not in ~/.ray/auth_token."
    )
