"""The addresses that the servers of Ray Serve listen on.

Ray Serve takes an address for HTTP alone. Its gRPC servers listen on all interfaces: the one by
which deployments call each other, which runs what it is sent once the token fits, and the ones that
answer clients behind HAProxy. Imported in a process of Serve, this module binds the former to the
address of the node, and the latter to loopback and, where HTTP is for other machines too, to the
address of the node.

Written against Ray 2.60, whose private functions it replaces; `tests/serve/test_bind.py` touches
each of them.
"""

from typing import Any

import ray
from ray.util import get_node_ip_address

from cluster.connect import LOOPBACK
from serve.ray_serve_internals import (
    SERVE_CONTROLLER_NAME,
    SERVE_NAMESPACE,
    build_address,
    default_impl,
    replica,
)

ASK_S = 60.0

_add_port_to_grpc_server = replica.add_port_to_grpc_server
_add_grpc_address = default_impl.add_grpc_address

# The address that this process answers HTTP at; on loopback until it is known.
_http_host = LOOPBACK[0]


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return host in LOOPBACK or host.startswith("127.")


async def http_host() -> str:
    """Return the address that clients reach this server at.

    From Serve's controller: where a server is described by a file, the address is in that file and
    not among the options of the application.
    """
    options = await _controller().get_http_config.remote()
    return str(options.host)


def set_http_host() -> None:
    """Ask for the address, for the servers of this process that start from here on.

    Blocks, as Serve calls it where nothing can be awaited: while a server starts.
    """
    global _http_host
    _http_host = ray.get(_controller().get_http_config.remote(), timeout=ASK_S).host


def grpc_hosts() -> list[str]:
    """The addresses for clients' gRPC calls.

    HAProxy reaches a server on its own node by loopback, one on another node by its address.
    """
    if is_loopback(_http_host):
        return [LOOPBACK[0]]
    return sorted({LOOPBACK[0], get_node_ip_address()})


def add_grpc_address(server: Any, address: str) -> None:
    port = address.rpartition(":")[2]
    for host in grpc_hosts():
        _add_grpc_address(server, build_address(host, port))


def add_port_to_grpc_server(server: Any, address: str) -> Any:
    port = address.rpartition(":")[2]
    return _add_port_to_grpc_server(server, build_address(get_node_ip_address(), port))


def _controller() -> Any:
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


replica.add_port_to_grpc_server = add_port_to_grpc_server
default_impl.add_grpc_address = add_grpc_address
