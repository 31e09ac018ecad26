"""The addresses that the servers of Ray Serve listen on.

Ray Serve has an option for the HTTP address only. Its gRPC servers listen on all interfaces: those
for calls between deployments, which run code that they receive if the token is valid, and those
for clients behind HAProxy. When this module is imported in a process of Serve, it binds the former
to the address of the node, and the latter to loopback and, if HTTP is for other machines too, to
the address of the node.

If Ray's nodes use TLS between each other, a replica uses TLS with HAProxy, with the certificate of
its node. Ray's own proxy, which HAProxy uses if there is no replica, does not.

Written for Ray 2.60, whose private functions it replaces; `tests/serve/test_bind.py` uses each of
them.
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

# Seconds to wait for the response of Serve's controller.
ASK_S = 60.0

_add_port_to_grpc_server = replica.add_port_to_grpc_server
_start_asgi_http_server = replica.start_asgi_http_server
_add_grpc_address = default_impl.add_grpc_address

# The HTTP address of this process; loopback until it is known.
_http_host = LOOPBACK[0]


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    return host in LOOPBACK or host.startswith("127.")


async def http_host() -> str:
    """Return the address at which clients reach this server.

    It comes from Serve's controller, because a server that is deployed from a file has the address
    in that file and not in the options of the application.
    """
    options = await _controller().get_http_config.remote()
    return str(options.host)


def set_http_host() -> None:
    """Look up the address for the servers that this process starts later.

    Blocks, because Serve calls it while a server starts, where nothing can be awaited.
    """
    global _http_host
    _http_host = ray.get(_controller().get_http_config.remote(), timeout=ASK_S).host


def grpc_hosts() -> list[str]:
    """Return the addresses for clients' gRPC calls.

    HAProxy reaches a server on its own node over loopback, and one on another node at its address.
    """
    if is_loopback(_http_host):
        return [LOOPBACK[0]]
    return sorted({LOOPBACK[0], get_node_ip_address()})


def add_grpc_address(server: Any, address: str) -> None:
    """Bind a gRPC server for clients to the port of `address` on each of `grpc_hosts`."""
    port = address.rpartition(":")[2]
    secure = certificates.nodes_speak_tls() and internal_replica_context() is not None
    add = _add_port_to_grpc_server if secure else _add_grpc_address
    for host in grpc_hosts():
        add(server, build_address(host, port))


def add_port_to_grpc_server(server: Any, address: str) -> Any:
    """Bind a gRPC server for calls between deployments to the node's address."""
    port = address.rpartition(":")[2]
    return _add_port_to_grpc_server(server, build_address(get_node_ip_address(), port))


def start_asgi_http_server(app: Any, http_options: Any, **given: Any) -> Any:
    """Start the HTTP server of a replica, with TLS if Ray's nodes use TLS."""
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
