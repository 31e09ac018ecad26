"""The addresses that the servers of Ray Serve listen on.

Ray Serve takes an address for HTTP alone. Its gRPC servers listen on all interfaces: the one by
which deployments call each other, which runs what it is sent once the token fits, and the ones that
answer clients behind HAProxy. Imported in a process of Serve, this module binds the former to the
address of the node, and the latter to loopback and, where HTTP is for other machines too, to the
address of the node.

Where Ray's nodes speak TLS with each other, so does a replica with HAProxy, with the certificate of
its node. Ray's own proxy, to which HAProxy turns where there is no replica, does not.

Written against Ray 2.60, whose private functions it replaces; `tests/serve/test_bind.py` touches
each of them.
"""

import os
from typing import Any

import ray
from ray.util import get_node_ip_address

from cluster.connect import LOOPBACK
from cluster.ingress import certificates
from serve.ray_serve_internals import (
    SERVE_CONTROLLER_NAME,
    SERVE_NAMESPACE,
    build_address,
    default_impl,
    internal_replica_context,
    replica,
)

ASK_S = 60.0

_add_port_to_grpc_server = replica.add_port_to_grpc_server
_start_asgi_http_server = replica.start_asgi_http_server
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
    secure = certificates.nodes_speak_tls() and internal_replica_context() is not None
    add = _add_port_to_grpc_server if secure else _add_grpc_address
    for host in grpc_hosts():
        add(server, build_address(host, port))


def add_port_to_grpc_server(server: Any, address: str) -> Any:
    port = address.rpartition(":")[2]
    return _add_port_to_grpc_server(server, build_address(get_node_ip_address(), port))


def start_asgi_http_server(app: Any, http_options: Any, **given: Any) -> Any:
    """Of a replica."""
    if certificates.nodes_speak_tls():
        files = {
            "ssl_certfile": os.environ["RAY_TLS_SERVER_CERT"],
            "ssl_keyfile": os.environ["RAY_TLS_SERVER_KEY"],
        }
        http_options = http_options.model_copy(update=files)
    return _start_asgi_http_server(app, http_options, **given)


def _controller() -> Any:
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


replica.start_asgi_http_server = start_asgi_http_server
replica.add_port_to_grpc_server = add_port_to_grpc_server
default_impl.add_grpc_address = add_grpc_address
